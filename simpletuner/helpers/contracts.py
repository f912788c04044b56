"""Values that cross folders, and the spec of a model family. Imports no torch.

Shapes: B batch, ... the axes of one sample's latents, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_matching"]
PipelineType = Literal["text2image", "image2image", "inpaint", "edit"]


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class TargetAlias:
    """Layers that a generic adapter target ("Attention", "FeedForward") selects in one family."""

    modules: tuple[str, ...]
    """Exact class names of modules; the adapter wraps their linear layers."""
    names: tuple[str, ...] = ()
    """Regular expressions on module paths, for layers directly in a block."""


@dataclass(frozen=True, slots=True)
class FusedSlice:
    """Rows of an original checkpoint's layer that make up one layer of the denoiser; all rows by default."""

    name: str
    """Name of the original layer, with dots."""
    pieces: tuple[int, ...] = (0,)
    """Indices, in the order of this layer's rows, of equal pieces of the original's rows."""
    num_pieces: int = 1
    """Number of equal pieces of the original's rows."""


@dataclass(frozen=True, slots=True)
class Licence:
    """Licence of a published model, by the names of its model card on the hub."""

    identifier: str
    """The hub's identifier; "other" with a name and a link."""
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class ModelLabels:
    """The names by which other programs know a model in the header of an adapter file."""

    architecture: str
    """Architecture ID of the metadata standard ModelSpec, without the /lora of an adapter."""
    version: str
    """ss_base_model_version, as other trainers write it."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Plain data about a family; the configuration is checked with it before torch is imported."""

    name: str
    flavours: Mapping[str, str]
    """Flavour -> model repository."""
    default_flavour: str
    prediction_types: tuple[PredictionType, ...]
    """The first is the default."""
    pixel_alignment: int
    """Training width and height are multiples of this many pixels."""
    minimum_alignment: int
    """Smallest alignment that the VAE and the denoiser allow, in pixels."""
    default_resolution: int
    """Edge of a square image, in pixels."""
    lora_targets: tuple[str, ...]
    """Default PEFT target module names."""
    slider_targets: tuple[str, ...] = ()
    """PEFT target module names of sliders, which leave text alone."""
    denoiser_name: str = "unet"
    """Folder of the denoiser in the diffusers layout, and the prefix of its keys in LoRA files."""
    num_train_timesteps: int = 1000
    dynamic_shift: Callable[[Mapping[str, object], int], float] | None = None
    """Shift of noise levels by the scheduler's configuration and the number of image tokens of 16x16 px; None
    without flow matching."""
    training_shift: Callable[[Mapping[str, object], int], float | None] | None = None
    """Shift in training instead of dynamic_shift, by the settings of noise and the number of image tokens; it
    returns None for dynamic_shift."""
    layer_sides: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    """Flavour -> class of a module with linear layers or convolutions in its denoiser -> smaller side of the
    smallest linear layer in it; None without linear layers."""
    num_weights: Mapping[str, int] = field(default_factory=dict)
    """Flavour -> number of weights of its denoiser, to a tenth of a billion."""
    num_text_encoders: int = 1
    text_encoder_lora_targets: tuple[str, ...] = ()
    """PEFT target module names of its text encoders; empty where these cannot be trained."""
    own_keys: frozenset[str] = frozenset()
    """Keys of config.json that only some families read, this one among them. Other families refuse them."""
    default_guidance: float = 7.5
    """Default guidance scale of validation images."""
    reference_flavours: frozenset[str] = frozenset()
    """Flavours whose denoiser takes reference images beside the noisy one."""
    problems: Callable[[Mapping[str, object]], Mapping[str, str]] | None = None
    """Family-specific checks: maps settings to {key: error message}."""
    lora_presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Preset -> PEFT target module names."""
    lora_preset_key: str | None = None
    """Key of config.json that names a preset; None without presets."""
    target_aliases: Mapping[str, TargetAlias] = field(default_factory=dict)
    licences: Mapping[str, Licence] = field(default_factory=dict)
    """Flavour -> licence of its repository, where it is known."""
    labels: Mapping[str, ModelLabels] = field(default_factory=dict)
    """Flavour -> labels of its adapters; "" for a model of the family that is none of its flavours."""
    original_code: str | None = None
    """Address of the code whose layer names the original checkpoint has."""
    original_name: Callable[[str], str | FusedSlice] | None = None
    """Maps a layer's path in diffusers to its name in the original checkpoint, with its rows if the original
    joins several layers. Raises ValueError for an unknown layer path."""

    def sees_references(self, flavour: str | None, repository: str) -> bool:
        """Whether a model takes reference images: the flavour's, else the repository's, else the default."""
        return (flavour or self.flavour_of(repository) or self.default_flavour) in self.reference_flavours

    def flavour_of(self, repository: str) -> str | None:
        """The flavour whose model a repository is; None for another model, a folder or a file."""
        return next((name for name, each in self.flavours.items() if each == repository), None)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its caption in a batch."""

    dataset_id: str
    path: str
    """Relative to the dataset's folder, with forward slashes; messages name the sample by it."""
    caption: str
    original_px: Size
    """Size of the stored image, EXIF orientation applied."""
    resized_px: Size
    """Size after resizing, before cropping."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized image, pixels."""
    target_px: Size
    """Size of the encoded image; a multiple of the alignment."""
    is_mirrored: bool = False
    """Left and right are exchanged, before the crop."""


@dataclass(frozen=True, slots=True)
class TextEmbeds:
    """Encoded prompts: named tensors whose first axis is the batch."""

    prompt_embeds: Tensor
    """[B, L, D]."""
    pooled: Tensor | None = None
    """[B, P]."""
    attention_mask: Tensor | None = None
    """[B, L] bool, false for padding."""
    others: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of one family alone, by name."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in cache files."""
        known = {"tokens": self.prompt_embeds, "pooled": self.pooled, "mask": self.attention_mask}
        return {name: tensor for name, tensor in known.items() if tensor is not None} | dict(self.others)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TextEmbeds:
        """Embeddings with these `tensors()`."""
        others = dict(tensors)
        return cls(
            prompt_embeds=others.pop("tokens"),
            pooled=others.pop("pooled", None),
            attention_mask=others.pop("mask", None),
            others=others,
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> TextEmbeds:
        """Embeddings with all tensors changed."""
        return self.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    @classmethod
    def stack(cls, texts: Sequence[TextEmbeds]) -> TextEmbeds:
        """One batch of embeddings with equal names and numbers of tokens."""
        from torch import cat

        parts = [text.tensors() for text in texts]
        assert all(part.keys() == parts[0].keys() for part in parts), "prompts differ in their tensors"
        return cls.from_tensors({name: cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one process."""

    latents: Tensor
    """[B, ...] float32, scaled as the denoiser expects."""
    text: TextEmbeds
    """Without tokens, L = 0, where the step encodes the captions itself."""
    samples: tuple[Sample, ...]
    sample_indices: tuple[int, ...]
    """Global index of each sample in the run; its noise and timestep derive from it."""
    is_regularisation: bool = False
    """The samples, all of one dataset, keep what the model knows; so do those of the other processes."""
    strength: float = 1.0
    """Strength of the adapter in forward and backward, the same for all samples."""
    loss_mask: Tensor | None = None
    """[B, 1, h, w] float32, factor of the loss of each element of the latents; None for 1."""
    references: tuple[Tensor, ...] = ()
    """Clean latents of the reference images that the denoiser sees too, each [B, ...] of its own size."""

    def __len__(self) -> int:
        return len(self.samples)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with all tensors changed."""
        return replace(
            self,
            latents=change(self.latents),
            text=self.text.each(change),
            loss_mask=None if self.loss_mask is None else change(self.loss_mask),
            references=tuple(map(change, self.references)),
        )

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which CUDA copies while the host goes on."""
        return self.each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; the host does not wait for copies to CUDA."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """A noised batch and its training target."""

    latents: Tensor
    """[B, ...]."""
    target: Tensor
    """[B, ...] float32."""
    timesteps: tuple[int, ...]
    """B timesteps in [0, T], as numbers on the host; rank mask and diffusion denoiser use the same ones."""
    weight: Tensor
    """[B] float32, loss weight of each sample."""
    sigmas: tuple[float, ...] | None = None
    """B noise levels in [0, 1], float32 values on the host; the timesteps derive from them. None for
    diffusion."""
    guidance: tuple[float, ...] | None = None
    """B guidance scales for a denoiser with a guidance embedding, else None."""
    signal_scales: tuple[float, ...] = ()
    """B factors of the clean latents in the noisy ones: sqrt(abar), or 1 - sigma for flow matching."""
    noise_scales: tuple[float, ...] = ()
    """B factors of the noise in them: sqrt(1 - abar), or sigma for flow matching."""
    loss_mask: Tensor | None = None
    """[B, 1, h, w] float32, factor of the loss of each element of the latents; None for 1."""

    @property
    def noise_to_signal(self) -> tuple[float, ...]:
        """B ratios of the two factors; infinite for noise alone."""
        assert len(self.noise_scales) == len(self.timesteps), "the family's add_noise gives no scales"
        pairs = zip(self.noise_scales, self.signal_scales, strict=True)
        return tuple(noise / signal if signal else math.inf for noise, signal in pairs)


@dataclass(frozen=True, slots=True)
class MicroBatchOutput:
    """Measurements of one micro-batch."""

    loss: Tensor
    """Scalar, detached, on the device."""
    sample_losses: Tensor
    """[B], detached, on the device; their mean is the loss."""
    samples: int
    timesteps: tuple[int, ...]
    active_rank: float | None
    """Mean active rank; None for an adapter without a rank schedule."""


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A prompt, a size and a seed, of which every column of a comparison has an image."""

    name: str
    prompt: str
    details: str
    """Size and seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedColumn:
    """The images of one checkpoint, at one strength and with one rank schedule."""

    title: str
    """Run and step."""
    details: str = ""
    """Strength and rank schedule, where they are not as trained."""
    run: Path | None = None
    """The output_dir of its run; None for the base model and for a file of no run."""
    step: int | None = None
    images: Mapping[str, Path] = field(default_factory=dict)
    """Name of a row -> file."""
    problem: str | None = None
    """The reason why images are missing."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Name of a measure -> mean over the images."""

    is_base: bool = False
    """Whether it is the base model."""

    @property
    def is_as_trained(self) -> bool:
        """Whether it is a checkpoint at strength 1 with its own rank schedule."""
        return self.run is not None and not self.details


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedGroup:
    """The columns of one base model, with the same prompts, seeds and settings."""

    model: str
    """Folder or repository of the base model."""
    settings: str
    """Steps, guidance and sampler, for display."""
    rows: tuple[ComparedRow, ...]
    columns: tuple[ComparedColumn, ...]
