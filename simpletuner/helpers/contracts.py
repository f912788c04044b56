"""What crosses folders: frozen values with shapes, and the facts that a model family declares.

Shapes: B batch, C latent channels, H W latent height and width, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_matching"]
PipelineKind = Literal["text2image", "image2image", "inpaint"]


@dataclass(frozen=True, slots=True, order=True)
class Size:
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class TargetAlias:
    """What a generic adapter target ("Attention", "FeedForward") means in one family."""

    modules: tuple[str, ...]
    """Exact class names whose linear layers are wrapped."""
    names: tuple[str, ...] = ()
    """Regular expressions on module paths, for layers that sit directly in a block."""


@dataclass(frozen=True, slots=True)
class FusedSlice:
    """Which rows of a layer of the original checkpoint a layer of the denoiser is; all of them by default."""

    name: str
    """Of the original layer, with dots."""
    pieces: tuple[int, ...] = (0,)
    """Where this layer's rows are, in their order, among equal pieces of the original's rows."""
    num_pieces: int = 1
    """Into how many pieces the original's rows are cut."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Plain data about a family, readable without torch, so that a configuration is checked early."""

    name: str
    flavours: Mapping[str, str]
    """Flavour -> model repository."""
    default_flavour: str
    prediction_types: tuple[PredictionType, ...]
    """The first is the default."""
    pixel_alignment: int
    """Training width and height are multiples of this many pixels."""
    minimum_alignment: int
    """The smallest alignment that the VAE and the denoiser allow, in pixels."""
    default_resolution: int
    """Pixels of a square image's edge."""
    lora_targets: tuple[str, ...]
    """PEFT target module names when the user names none."""
    denoiser_name: str = "unet"
    """Folder of the denoiser in the diffusers layout, and the prefix of its keys in LoRA files."""
    num_train_timesteps: int = 1000
    num_text_encoders: int = 1
    own_keys: frozenset[str] = frozenset()
    """Keys of config.json that are about models of this kind; to a family that does not list them they mean
    nothing."""
    samplers: tuple[str, ...] = ()
    """Sampling schedulers that validation can use."""
    default_guidance: float = 7.5
    """Guidance scale of pictures when none is given."""
    problems: Callable[[Mapping[str, object]], Mapping[str, str]] | None = None
    """Values of the keys about model, noise and pictures -> key -> what is wrong with it for this family."""
    lora_presets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of a preset -> PEFT target module names."""
    lora_preset_key: str | None = None
    """The key of config.json that names a preset; None when the family has none."""
    target_aliases: Mapping[str, TargetAlias] = field(default_factory=dict)
    original_name: Callable[[str], str | FusedSlice] | None = None
    """A denoiser layer's path in diffusers -> in the original checkpoint, which other tools go by, with its
    rows where the original joins several layers; raises ValueError for a path that the model has not."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its caption as they enter a batch."""

    dataset_id: str
    path: str
    """Relative to the dataset's folder, with forward slashes: the sample's name in messages."""
    caption: str
    original_px: Size
    """The image as stored, orientation applied."""
    resized_px: Size
    """After resizing, before cropping."""
    crop_top_left: tuple[int, int]
    """(top, left) of the crop in the resized image, pixels."""
    target_px: Size
    """What is encoded; a multiple of the family's alignment."""


@dataclass(frozen=True, slots=True)
class TextEmbeds:
    """Encoded prompts."""

    prompt_embeds: Tensor
    """[B, L, D]."""
    pooled: Tensor | None = None
    """[B, P]."""
    attention_mask: Tensor | None = None
    """[B, L], true where a token is real."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one micro-batch of one process trains on."""

    latents: Tensor
    """[B, C, H, W] float32, scaled as the denoiser expects."""
    text: TextEmbeds
    samples: tuple[Sample, ...]
    sample_indices: tuple[int, ...]
    """Place of each sample in the endless sequence of the run: the key of its noise and timestep."""

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class NoisyBatch:
    """A noised batch and what the model should predict from it."""

    latents: Tensor
    """[B, C, H, W]."""
    target: Tensor
    """[B, C, H, W] float32."""
    timesteps: tuple[int, ...]
    """B values in [0, T], known on the host; the rank mask and a diffusion denoiser are both given these."""
    weight: Tensor
    """[B] float32, the loss weight of each sample."""
    sigmas: tuple[float, ...] | None = None
    """B noise levels in [0, 1], float32 values known on the host, that a flow-matching denoiser is given and
    that the timesteps were made from; None for diffusion."""
    guidance: tuple[float, ...] | None = None
    """B guidance scales for a denoiser that is told one; None when it is not."""


@dataclass(frozen=True, slots=True)
class MicroBatchOutput:
    """What one micro-batch measured."""

    loss: Tensor
    """Scalar, detached, on the device."""
    sample_losses: Tensor
    """[B], detached, on the device; their mean is the loss."""
    samples: int
    timesteps: tuple[int, ...]
    active_rank: float | None
    """Mean number of open ranks, None when the adapter has no schedule."""
