"""SDXL: a UNet with two CLIP text encoders, conditioned on size and crop of each image.

Shapes: B batch, L text tokens, D text width, P pooled width, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.helpers.contracts import Batch, NoisyBatch, PipelineType, Sample, Size, TextEmbeds
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.autoencoder import encode_scaled
from simpletuner.helpers.models.diffusion import DiffusionPrediction, DiffusionSchedule, add_noise
from simpletuner.helpers.models.family import NO_TEXT_ENCODERS, FamilyContext, ModelFamily
from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.schedulers import make_sampler, training_alpha_bars
from simpletuner.helpers.models.sdxl.chunks import CLIP_TOKENS, WORD_TOKENS, encode_chunks
from simpletuner.helpers.models.sdxl.components import SDXLComponents, find_components
from simpletuner.helpers.models.sdxl.pipeline import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.text import ScriptWarning, TruncationWarning, check_finite_text

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig

PIPELINES: dict[PipelineType, type[diffusers.DiffusionPipeline]] = {
    "text2image": StableDiffusionXLPipeline,
    "image2image": StableDiffusionXLImg2ImgPipeline,
    "inpaint": StableDiffusionXLInpaintPipeline,
}


class SDXL(ModelFamily):
    """Stable Diffusion XL and models of its architecture."""

    spec = SPEC
    components: SDXLComponents
    denoiser_class = UNet2DConditionModel

    def __init__(self, context: FamilyContext) -> None:
        super().__init__(context)
        self.components = find_components(context.model)
        self._prediction: DiffusionPrediction = self.components.prediction_type(context.model.prediction_type)
        self._zero_snr = context.model.rescale_betas_zero_snr or self.components.scheduler_is_zero_snr
        self._schedule = DiffusionSchedule(
            training_alpha_bars(self.components.scheduler, zero_snr=self._zero_snr),
            prediction=self._prediction,
            noise=context.noise,
        )
        self._num_chunks = context.model.max_token_length // WORD_TOKENS
        self._truncation_warning = TruncationWarning(limit=context.model.max_token_length + 2)
        self._script_warning = ScriptWarning(encoder="CLIP")

    @property
    def default_resolution(self) -> int:
        """What the UNet states, as in diffusers' pipelines: the embedded model has 64 px."""
        edge = self.components.denoiser.config.get("sample_size")
        channels = self.components.vae.config.get("block_out_channels")
        if not isinstance(edge, int) or not isinstance(channels, list):
            return super().default_resolution
        return edge << (len(channels) - 1)

    @cached_property
    def text_identity(self) -> str:
        """Text that changes with tokenizers, text encoders, precision and the encoding of no prompt."""
        parts = self.components
        chunks = f" chunks={self._num_chunks}" if self._num_chunks > 1 else ""
        return self._text_identity(
            parts.tokenizer,
            parts.text_encoder,
            parts.tokenizer_2,
            parts.text_encoder_2,
            settings=f"{self.weight_dtype} zeros={parts.empty_prompt_is_zero}{chunks}",
        )

    def make_prompt_encoder(self) -> diffusers.StableDiffusionXLPipeline:
        """The stock pipeline with nothing but tokenizers and text encoders."""
        parts = self.components
        text_encoder = self._load_text_encoder(CLIPTextModel, parts.text_encoder, number=1)
        text_encoder_2 = self._load_text_encoder(CLIPTextModelWithProjection, parts.text_encoder_2, number=2)
        positions = min(each.config.max_position_embeddings for each in (text_encoder, text_encoder_2))
        if self._num_chunks > 1 and positions < CLIP_TOKENS:
            raise ModelError(
                f"max_token_length {self._num_chunks * WORD_TOKENS} needs text encoders of {CLIP_TOKENS} "
                f"tokens, and this model has one of {positions}. Remove max_token_length."
            )
        with quiet():
            return diffusers.StableDiffusionXLPipeline(
                vae=None,
                text_encoder=text_encoder,
                text_encoder_2=text_encoder_2,
                tokenizer=CLIPTokenizer.from_pretrained(str(parts.tokenizer.folder), local_files_only=True),
                tokenizer_2=CLIPTokenizer.from_pretrained(
                    str(parts.tokenizer_2.folder), local_files_only=True
                ),
                unet=None,
                scheduler=None,
                force_zeros_for_empty_prompt=parts.empty_prompt_is_zero,
                add_watermarker=False,
            )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, 4, H/8, W/8] float32 latents.

        Raises:
            DataError: A latent is not finite.
        """
        return encode_scaled(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] and [1, P] float32 on the CPU; L is 77 for each chunk.

        The empty prompt gives the pipeline's default negative embeds: zeros if the model's configuration says
        so, as SDXL was trained without a caption, else the encoding of "".

        Raises:
            DataError: An embedding is not finite.
        """
        with torch.no_grad():
            encoded = self._encoded(prompts)
        for prompt, tensors in zip(prompts, encoded, strict=True):
            check_finite_text(prompt, *tensors, dtype=self.weight_dtype)
        return [TextEmbeds(prompt_embeds=_to_host(text), pooled=_to_host(pooled)) for text, pooled in encoded]

    def embed_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """Encode prompts to [B, L, D] and [B, P] on the device, with gradients, as `encode_prompts` does."""
        texts, pooled = zip(*self._encoded(prompts), strict=True)
        return TextEmbeds(prompt_embeds=torch.cat(texts), pooled=torch.cat(pooled))

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Both loaded text encoders, by their names in diffusers' files."""
        encoder = self.prompt_encoder
        return {"text_encoder": encoder.text_encoder, "text_encoder_2": encoder.text_encoder_2}

    @property
    def tokenizers(self) -> dict[str, Any]:
        """Their loaded tokenizers, by the same names."""
        encoder = self.prompt_encoder
        return {"text_encoder": encoder.tokenizer, "text_encoder_2": encoder.tokenizer_2}

    def _encoded(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Embeds [1, L, D] and pooled [1, P] of each prompt, on the device."""
        with quiet():
            encoder = self.prompt_encoder
            # A new token of several embeddings is one word in a prompt.
            expanded = encoder.maybe_convert_prompt(list(prompts), encoder.tokenizer)
            lengths = [len(ids) for ids in encoder.tokenizer(expanded).input_ids]
            self._script_warning.check(prompts, encoder.tokenizer)
        self._truncation_warning.check(prompts, lengths)
        with torch.autocast(self.device.type, enabled=False), quiet():
            return list((self._in_chunks if self._num_chunks > 1 else self._in_one)(prompts))

    def _in_one(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeds [1, 77, D] and pooled [1, P] of each prompt, by the stock pipeline."""
        text, no_text, pooled, no_pooled = self.prompt_encoder.encode_prompt(
            prompt=list(prompts), device=self.device, negative_prompt=None
        )
        for index, prompt in enumerate(prompts):
            rows = slice(index, index + 1)
            yield (text[rows], pooled[rows]) if prompt else (no_text[rows], no_pooled[rows])

    def _in_chunks(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeds [1, 77 N, D] and pooled [1, P] of each prompt in N chunks."""
        for prompt in prompts:
            text, pooled = encode_chunks(
                self.prompt_encoder, prompt, num_chunks=self._num_chunks, device=self.device
            )
            is_zero = not prompt and self.components.empty_prompt_is_zero
            yield (torch.zeros_like(text), torch.zeros_like(pooled)) if is_zero else (text, pooled)

    def add_noise(
        self,
        latents: Tensor,
        *,
        sample_indices: Sequence[int],
        seed: int,
        shares: Sequence[float] | None = None,
    ) -> NoisyBatch:
        """Noise [B, 4, h, w] latents; depends on the seed, each sample's index and its share only."""
        return add_noise(
            latents.to(self.device),
            schedule=self._schedule,
            sample_indices=sample_indices,
            seed=seed,
            shares=shares,
        )

    def predict(self, denoiser: nn.Module, noisy: NoisyBatch, batch: Batch) -> Tensor:
        """Run the UNet on a noised batch; [B, 4, h, w] float32 noise or velocity."""
        prediction: Tensor = denoiser(
            noisy.latents.to(self.device, self.weight_dtype),
            torch.tensor(noisy.timesteps, dtype=torch.int64, device=self.device),
            encoder_hidden_states=batch.text.prompt_embeds.to(self.device, self.weight_dtype),
            added_cond_kwargs={
                "text_embeds": _pooled(batch.text).to(self.device, self.weight_dtype),
                # In float32: bfloat16 has no odd numbers above 256.
                "time_ids": time_ids(batch.samples).to(self.device),
            },
            return_dict=False,
        )[0]
        return prediction.float()

    def make_pipeline(
        self, denoiser: nn.Module, pipeline_type: PipelineType = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline with this UNet, without text encoders and watermark.

        Raises:
            ModelError: The sampler is unknown.
        """
        return self._new_pipeline(
            PIPELINES[pipeline_type],
            unet=denoiser,
            scheduler=make_sampler(
                self.components.scheduler,
                name=scheduler,
                prediction=self._prediction,
                zero_snr=self._zero_snr,
            ),
            force_zeros_for_empty_prompt=self.components.empty_prompt_is_zero,
            add_watermarker=False,
            **NO_TEXT_ENCODERS,
        )

    @property
    def pipelines(self) -> Mapping[PipelineType, type[diffusers.DiffusionPipeline]]:
        """The bundled pipelines, by their input."""
        return PIPELINES

    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, validation: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompt embeds and guidance."""
        tensors = {
            "prompt_embeds": prompt.prompt_embeds,
            "pooled_prompt_embeds": _pooled(prompt),
            "negative_prompt_embeds": negative.prompt_embeds,
            "negative_pooled_prompt_embeds": _pooled(negative),
        }
        rescale = validation.validation_guidance_rescale
        return {
            **{name: tensor.to(self.device, self.weight_dtype) for name, tensor in tensors.items()},
            "guidance_scale": validation.validation_guidance,
            # The image2image and inpaint pipelines have no such argument.
            **({"guidance_rescale": rescale} if rescale else {}),
        }


def time_ids(samples: Sequence[Sample]) -> Tensor:
    """[B, 6] float32: original height and width, crop top and left, target height and width, in pixels.

    Source: Podell et al., arXiv:2307.01952, section 2.2; the order is that of diffusers' _get_add_time_ids.
    """
    return torch.tensor(
        [
            (
                sample.original_px.height,
                sample.original_px.width,
                *sample.crop_top_left,
                sample.target_px.height,
                sample.target_px.width,
            )
            for sample in samples
        ],
        dtype=torch.float32,
    )


def _pooled(text: TextEmbeds) -> Tensor:
    assert text.pooled is not None, "SDXL needs pooled embeddings"
    return text.pooled


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone()
