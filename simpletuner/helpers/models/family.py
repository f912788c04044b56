"""The seam: what a model family is to the rest of the trainer.

Shapes: B batch, C latent channels, H W pixels, h w latent height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from simpletuner.helpers.contracts import Batch, ModelSpec, NoisyBatch, PipelineKind, Size, TextEmbeds

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

    from simpletuner.helpers.configuration.schema.sections import (
        ModelConfig,
        NoiseConfig,
        PrecisionConfig,
        ValidationConfig,
    )


class ModelFamily(ABC):
    """One model architecture: its facts, then its steps in the order a batch meets them."""

    spec: ClassVar[ModelSpec]

    def __init__(
        self,
        model: ModelConfig,
        *,
        noise: NoiseConfig,
        precision: PrecisionConfig,
        device: torch.device,
        weight_dtype: torch.dtype,
    ) -> None:
        """Check that the model is of this family; weights are loaded by the load methods.

        Args:
            model: Which model, and which components of it come from elsewhere.
            noise: How samples are noised and weighed.
            precision: Memory savers of the VAE.
            device: Where models run.
            weight_dtype: Of the denoiser and the text encoders; the VAE decides for itself.

        Raises:
            ModelError: The model cannot be found, or is of another family.
        """
        self.model = model
        self.noise = noise
        self.precision = precision
        self.device = device
        self.weight_dtype = weight_dtype

    @property
    def denoiser_device(self) -> torch.device:
        """Where `load_denoiser` puts it: on the host if parts stay there or are quantised on the way."""
        is_whole = self.precision.base_model_precision == "no_change"
        return self.device if is_whole and not self.precision.enable_group_offload else torch.device("cpu")

    @property
    @abstractmethod
    def vae_identity(self) -> str:
        """Changes whenever the VAE could encode an image differently; part of a latent's cache key."""

    @property
    @abstractmethod
    def text_identity(self) -> str:
        """Changes whenever a prompt could be encoded differently; part of an embedding's cache key."""

    @abstractmethod
    def load_vae(self) -> None:
        """Load the VAE to the device; does nothing when it is there."""

    @abstractmethod
    def unload_vae(self) -> None:
        """Free the VAE."""

    @abstractmethod
    def load_text_encoders(self) -> None:
        """Load tokenizers and text encoders to the device; does nothing when they are there."""

    @abstractmethod
    def unload_text_encoders(self) -> None:
        """Free the text encoders."""

    @abstractmethod
    def load_denoiser(self) -> nn.Module:
        """The denoiser, frozen, on `denoiser_device` in weight_dtype; the caller keeps it.

        Raises:
            ModelError: The weights are missing, damaged or of another architecture.
        """

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, C, h, w] float32 latents on the device.

        Raises:
            DataError: The VAE produced a value that is not finite.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to embeddings with a batch dimension of 1, on the CPU.

        The empty prompt gives what the model takes for no prompt at all.
        """

    def stack_text(self, texts: Sequence[TextEmbeds]) -> TextEmbeds:
        """Join embeddings, all with as many tokens, along the batch dimension."""
        return TextEmbeds(
            prompt_embeds=torch.cat([text.prompt_embeds for text in texts]),
            pooled=_joined([text.pooled for text in texts]),
            attention_mask=_joined([text.attention_mask for text in texts]),
        )

    @abstractmethod
    def add_noise(self, latents: Tensor, *, sample_indices: Sequence[int], seed: int) -> NoisyBatch:
        """Noise [B, C, h, w] latents as a function of the seed and each sample's position alone."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, noised: NoisyBatch, batch: Batch) -> Tensor:
        """Run the denoiser on a noised batch; [B, C, h, w] float32 in the space of noised.target."""

    @abstractmethod
    def make_pipeline(
        self, denoiser: nn.Module, kind: PipelineKind = "text2image", *, scheduler: str | None = None
    ) -> DiffusionPipeline:
        """The bundled pipeline around this very denoiser, without text encoders, on the device.

        Args:
            denoiser: Used as it is, with whatever adapter is attached to it.
            kind: What the pipeline starts from.
            scheduler: Name of a sampling scheduler; None takes the model's own.

        Raises:
            ModelError: The scheduler is not known.
        """

    @abstractmethod
    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, pictures: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call that hand over encoded prompts and steer the sampling.

        Args:
            prompt: What the picture shows.
            negative: What guidance leads away from.
            pictures: Guidance and number of steps.
            size: Of the picture.
        """

    def _release_memory(self) -> None:
        """Give the memory of what was freed back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The parts along their first dimension; None when there are none."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
