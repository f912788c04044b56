"""A model family, as the rest of the trainer sees it.

Shapes: B batch, H W pixels, ... the axes of one sample's latents ([C, h, w] for images).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.contracts import Batch, ModelSpec, NoisyBatch, PipelineType, Size, TextEmbeds
from simpletuner.helpers.models.autoencoder import ComputesInFloat32, Float32Autoencoder, load_autoencoder
from simpletuner.helpers.models.component_checks import ModelComponents
from simpletuner.helpers.models.loading import Component, Model, load_weights, quiet
from simpletuner.helpers.models.quantisation import quantize_and_move_text_encoder, text_precision_identity

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from simpletuner.helpers.configuration.schema.model import ModelConfig
    from simpletuner.helpers.configuration.schema.noise import NoiseConfig
    from simpletuner.helpers.configuration.schema.sections import (
        PrecisionConfig,
        ValidationConfig,
    )


NO_TEXT_ENCODERS = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
"""Arguments of a pipeline with two text encoders that gets prompt embeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyContext:
    """Settings, device and dtype of a run, as a family needs them."""

    model: ModelConfig
    noise: NoiseConfig
    precision: PrecisionConfig
    device: torch.device
    weight_dtype: torch.dtype
    """Dtype of denoiser and text encoders; the VAE computes in float32."""


class ModelFamily(ABC):
    """One model architecture: its spec, then its steps in the order a batch meets them.

    The constructor of a family finds and checks `components`; the load methods load their weights.
    """

    spec: ClassVar[ModelSpec]
    denoiser_class: ClassVar[type[Any]]
    vae_class: ClassVar[type[ComputesInFloat32]] = Float32Autoencoder
    components: ModelComponents

    def __init__(self, context: FamilyContext) -> None:
        self.noise, self.precision = context.noise, context.precision
        self.device, self.weight_dtype = context.device, context.weight_dtype
        self._vae: Any = None
        self._encoder: Any = None

    @cached_property
    def vae_identity(self) -> str:
        """Text that changes with the VAE's files and settings; part of the cache key of latents."""
        tiling = " tiled" if self.precision.vae_enable_tiling else ""
        return f"{self.components.vae.identity()} float32 mean{tiling}"

    @property
    def default_resolution(self) -> int:
        """Edge in pixels of an image whose size nobody states."""
        return self.spec.default_resolution

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """Text that changes with everything that changes prompt embeds; part of their cache key.

        Make it with `_text_identity`.
        """

    @property
    def denoiser_device(self) -> torch.device:
        """Device of a freshly loaded denoiser: the host if it is quantised or offloaded afterwards."""
        is_whole = self.precision.base_model_precision == UNCHANGED
        return self.device if is_whole and not self.precision.enable_group_offload else torch.device("cpu")

    @property
    def vae(self) -> Any:
        """The loaded VAE."""
        assert self._vae is not None, "load_vae comes first"
        return self._vae

    @property
    def prompt_encoder(self) -> Any:
        """The loaded tokenizers and text encoders, as `make_prompt_encoder` returned them."""
        assert self._encoder is not None, "load_text_encoders comes first"
        return self._encoder

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The loaded text encoders whose layers adapter files hold, by their names in diffusers' files."""
        return {}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The loaded tokenizers of those text encoders, by the same names."""
        return {}

    def load_vae(self) -> None:
        """Load the VAE to the device, unless it is loaded."""
        if self._vae is None:
            self._vae = load_autoencoder(
                self.vae_class, self.components.vae, precision=self.precision, device=self.device
            )

    def unload_vae(self) -> None:
        """Free the VAE."""
        self._vae = None
        self._release_memory()

    def load_text_encoders(self) -> None:
        """Load tokenizers and text encoders to the device, unless they are loaded."""
        if self._encoder is None:
            self._encoder = self.make_prompt_encoder()

    def unload_text_encoders(self) -> None:
        """Free the text encoders."""
        self._encoder = None
        self._release_memory()

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser, frozen, in weight_dtype to `denoiser_device`; the caller owns it.

        Raises:
            ModelError: The weights are damaged, incomplete or of another architecture.
        """
        denoiser: nn.Module = load_weights(
            self.denoiser_class, self.components.denoiser, dtype=self.weight_dtype
        )
        return denoiser.requires_grad_(False).to(self.denoiser_device)

    @abstractmethod
    def make_prompt_encoder(self) -> Any:
        """Load tokenizers and text encoders, in weight_dtype on the device, usually into a pipeline.

        Raises:
            ModelError: A file is damaged, incomplete or of another architecture.
        """

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, ...] float32 latents on the device.

        Raises:
            DataError: A latent is not finite.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt on its own, batch axis 1, on the CPU; all have the same number of tokens.

        The empty prompt stands for no prompt: caption dropout and the negative prompt use it.

        Raises:
            DataError: An embedding is not finite.
        """

    def embed_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """Encode prompts as one batch on the device, with gradients; `encode_prompts` gives the same values.

        Only families whose spec has text_encoder_lora_targets have it.
        """
        raise NotImplementedError(f"{self.spec.name} trains no text encoders")

    @abstractmethod
    def add_noise(
        self,
        latents: Tensor,
        *,
        sample_indices: Sequence[int],
        seed: int,
        shares: Sequence[float] | None = None,
    ) -> NoisyBatch:
        """Noise [B, ...] latents; depends on the seed and each sample's index only.

        Args:
            latents: On any device.
            sample_indices: B indices.
            seed: Of the run.
            shares: In place of drawn noise levels, B quantiles in (0, 1) of their distribution in training.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy: NoisyBatch, batch: Batch) -> Tensor:
        """Run the denoiser on a noised batch; float32, shape and space of noisy.target."""

    @abstractmethod
    def make_pipeline(
        self, denoiser: nn.Module, pipeline_type: PipelineType = "text2image", *, scheduler: str | None = None
    ) -> DiffusionPipeline:
        """The bundled pipeline with this denoiser and its adapter, without text encoders, on the device.

        Args:
            denoiser: Not copied.
            pipeline_type: Input of the pipeline: text alone, an image to start from, that and a mask, or
                "edit", the references of `pipeline_inputs`; only families with `reference_flavours` have it.
            scheduler: Name of a sampler; None: the model's.

        Raises:
            ModelError: The sampler is unknown, or the family has no such pipeline.
        """

    @property
    def pipelines(self) -> Mapping[PipelineType, type[Any]]:
        """The classes that `make_pipeline` makes, of a family that starts from images too."""
        return {}

    @abstractmethod
    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, validation: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompt embeds, guidance and sampling steps.

        A family with `reference_flavours` also takes `references` for its "edit" pipeline: the pixels of
        reference images, each [3, H, W] in [-1, 1], its edges multiples of `minimum_alignment`.

        Args:
            prompt: Embeds of the prompt.
            negative: Embeds of the negative prompt.
            validation: Guidance and number of steps.
            size: Size of the image.
        """

    def sampling_context(
        self, pipeline: Any, *, validation: ValidationConfig
    ) -> AbstractContextManager[None]:
        """Entered around each call of a pipeline of this family, for what its arguments cannot say."""
        return nullcontext()

    def _text_identity(self, *components: Component, settings: str) -> str:
        """Identity of the files of these components, other settings and the text encoders' precision."""
        files = " ".join(component.identity() for component in components)
        return f"{files} {settings}{text_precision_identity(self.precision)}"

    def _load_text_encoder(self, model_class: type[Model], component: Component, *, number: int) -> Model:
        """Load text encoder `number`, counted from 1, in the user's precision to the device."""
        encoder = load_weights(model_class, component, dtype=self.weight_dtype)
        return quantize_and_move_text_encoder(encoder, number, self.precision, device=self.device)

    def _new_pipeline(self, pipeline_class: type[Any], **components: object) -> DiffusionPipeline:
        """A pipeline with the VAE and these components, without progress bar."""
        self.load_vae()
        with quiet():
            pipeline = pipeline_class(vae=self.vae, **components)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _release_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
