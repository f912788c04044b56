"""Flux.1: packed latents and T5 tokens in one transformer, conditioned on pooled CLIP text and guidance.

Shapes: B batch, C latent channels, h w latent height and width, N image tokens, L text tokens, D text width,
P pooled width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from simpletuner.helpers.adapters.pipeline import one_pass_in_first_steps
from simpletuner.helpers.contracts import Batch, NoisyBatch, PipelineType, Size, TextEmbeds
from simpletuner.helpers.models.autoencoder import encode_scaled
from simpletuner.helpers.models.family import NO_TEXT_ENCODERS, FamilyContext, ModelFamily
from simpletuner.helpers.models.flow_matching import (
    add_noise,
    distribution_of,
    draw_guidance,
    sampling_sigmas,
    timestep_input,
    unshifted_sampler,
)
from simpletuner.helpers.models.flux.components import FluxComponents, find_components
from simpletuner.helpers.models.flux.editing import FluxEditPipeline
from simpletuner.helpers.models.flux.pipeline import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from simpletuner.helpers.models.flux.spec import SPEC
from simpletuner.helpers.models.flux.tokens import PATCH, ids_of_images, pack_images
from simpletuner.helpers.models.flux.tokens import image_ids as image_ids  # others import these from here
from simpletuner.helpers.models.flux.tokens import pack as pack
from simpletuner.helpers.models.flux.tokens import unpack as unpack
from simpletuner.helpers.models.key_groups import NO_GUIDANCE
from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.shift import shift_at
from simpletuner.helpers.models.text import ScriptWarning, TruncationWarning, check_finite_text

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig

logger = logging.getLogger(__name__)

PIPELINES: dict[PipelineType, type[diffusers.DiffusionPipeline]] = {
    "text2image": FluxPipeline,
    "image2image": FluxImg2ImgPipeline,
    "inpaint": FluxInpaintPipeline,
    "edit": FluxEditPipeline,
}
VAE_SCALE = 8
"""Pixels along the edge of a latent position."""


class Flux(ModelFamily):
    """Flux.1 dev, schnell, Krea, Kontext and models of their architecture."""

    spec = SPEC
    components: FluxComponents
    denoiser_class = FluxTransformer2DModel

    def __init__(self, context: FamilyContext) -> None:
        super().__init__(context)
        self.components = find_components(context.model)
        self._distribution = distribution_of(context.noise)
        self._truncation_warning = TruncationWarning(limit=self.components.text_tokens, encoder="T5")
        self._script_warning = ScriptWarning(encoder="T5")
        guidance = {key: value for key, value in context.noise if key in NO_GUIDANCE}
        if not self.components.has_guidance and guidance != NO_GUIDANCE:
            logger.warning("This model has no guidance embedding: flux_guidance_* has no effect.")

    @cached_property
    def text_identity(self) -> str:
        """Text that changes with tokenizers, text encoders, precision and the number of tokens."""
        parts = self.components
        return self._text_identity(
            parts.tokenizer,
            parts.text_encoder,
            parts.tokenizer_2,
            parts.text_encoder_2,
            settings=f"{self.weight_dtype} {parts.text_tokens}",
        )

    def make_prompt_encoder(self) -> diffusers.FluxPipeline:
        """The stock pipeline with nothing but CLIP, T5 and their tokenizers."""
        parts = self.components
        text_encoder = self._load_text_encoder(CLIPTextModel, parts.text_encoder, number=1)
        text_encoder_2 = self._load_text_encoder(T5EncoderModel, parts.text_encoder_2, number=2)
        with quiet():
            return diffusers.FluxPipeline(
                vae=None,
                text_encoder=text_encoder,
                text_encoder_2=text_encoder_2,
                tokenizer=CLIPTokenizer.from_pretrained(str(parts.tokenizer.folder), local_files_only=True),
                tokenizer_2=T5Tokenizer.from_pretrained(str(parts.tokenizer_2.folder), local_files_only=True),
                transformer=None,
                scheduler=None,
            )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, 16, H/8, W/8] float32 latents.

        Raises:
            DataError: A latent is not finite.
        """
        return encode_scaled(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] and [1, P] in weight_dtype and a [1, L] mask, on the CPU.

        Raises:
            DataError: An embedding is not finite.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), quiet():
            prompt_embeds, pooled, _ = self.prompt_encoder.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                max_sequence_length=self.components.text_tokens,
            )
        mask = self._attention_mask(prompts)
        embeds = []
        for index, prompt in enumerate(prompts):
            rows = slice(index, index + 1)
            check_finite_text(prompt, prompt_embeds[rows], pooled[rows], dtype=self.weight_dtype)
            embeds.append(
                TextEmbeds(
                    prompt_embeds=prompt_embeds[rows].cpu().clone(),
                    pooled=pooled[rows].cpu().clone(),
                    attention_mask=mask[rows].clone(),
                )
            )
        return embeds

    def add_noise(
        self,
        latents: Tensor,
        *,
        sample_indices: Sequence[int],
        seed: int,
        shares: Sequence[float] | None = None,
    ) -> NoisyBatch:
        """Noise [B, C, h, w] latents; depends on the seed, each sample's index and its share only."""
        height, width = latents.shape[-2:]
        noisy = add_noise(
            latents.to(self.device),
            distribution=self._distribution,
            shift=self._shift(num_tokens=height * width // PATCH**2),
            sample_indices=sample_indices,
            seed=seed,
            shares=shares,
        )
        if not self.components.has_guidance:
            return noisy
        return replace(noisy, guidance=draw_guidance(self.noise, sample_indices=sample_indices, seed=seed))

    def predict(self, denoiser: nn.Module, noisy: NoisyBatch, batch: Batch) -> Tensor:
        """Run the transformer on a noised batch; [B, C, h, w] float32 velocity from image to noise.

        The tokens of the batch's references follow those of the noisy image.
        """
        assert noisy.sigmas is not None, "a flow-matching batch has noise levels"
        height, width = noisy.latents.shape[-2:]
        text, images = batch.text, (noisy.latents, *batch.references)
        tokens = pack_images([each.to(self.device, self.weight_dtype) for each in images])
        prediction: Tensor = denoiser(
            hidden_states=tokens,
            timestep=timestep_input(noisy.sigmas, dtype=self.weight_dtype).to(self.device),
            guidance=None if noisy.guidance is None else torch.tensor(noisy.guidance, device=self.device),
            pooled_projections=_pooled(text).to(self.device, self.weight_dtype),
            encoder_hidden_states=text.prompt_embeds.to(self.device, self.weight_dtype),
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3, device=self.device),
            img_ids=ids_of_images(images, device=self.device),
            joint_attention_kwargs=self._attention_arguments(text, num_tokens=tokens.shape[1]),
            return_dict=False,
        )[0]
        num_noisy = height * width // PATCH**2
        return unpack(prediction[:, :num_noisy].float(), height=height // PATCH)

    def make_pipeline(
        self, denoiser: nn.Module, pipeline_type: PipelineType = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline with this transformer, without text encoders.

        Its scheduler does not shift sigmas: `pipeline_inputs` passes them with the shift of training.
        """
        return self._new_pipeline(
            PIPELINES[pipeline_type],
            transformer=denoiser,
            scheduler=unshifted_sampler(self.components.scheduler, name=scheduler),
            **NO_TEXT_ENCODERS,
        )

    @property
    def pipelines(self) -> Mapping[PipelineType, type[diffusers.DiffusionPipeline]]:
        """The bundled pipelines, by their input."""
        return PIPELINES

    def pipeline_inputs(
        self,
        prompt: TextEmbeds,
        negative: TextEmbeds,
        *,
        validation: ValidationConfig,
        size: Size,
        references: Sequence[Tensor] = (),
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompt embeds, guidance, shifted sigmas, references."""
        num_tokens = _num_tokens(size.height, size.width)
        tensors = {"prompt_embeds": prompt.prompt_embeds, "pooled_prompt_embeds": _pooled(prompt)}
        if validation.validation_guidance_real > 1:
            tensors |= {
                "negative_prompt_embeds": negative.prompt_embeds,
                "negative_pooled_prompt_embeds": _pooled(negative),
            }
        num_attended = num_tokens + sum(_num_tokens(*each.shape[-2:]) for each in references)
        inputs: dict[str, object] = {
            **{name: tensor.to(self.device, self.weight_dtype) for name, tensor in tensors.items()},
            "guidance_scale": validation.validation_guidance,
            "true_cfg_scale": validation.validation_guidance_real,
            "sigmas": sampling_sigmas(
                validation.validation_num_inference_steps, self._shift(num_tokens=num_tokens)
            ),
            "joint_attention_kwargs": self._attention_arguments(prompt, num_tokens=num_attended),
        }
        if references:
            inputs["references"] = [self.encode_images(each[None]) for each in references]
        return inputs

    def sampling_context(
        self, pipeline: Any, *, validation: ValidationConfig
    ) -> AbstractContextManager[None]:
        """Real guidance begins after validation_no_cfg_until_timestep denoising steps."""
        if validation.validation_guidance_real <= 1:
            return nullcontext()
        steps = validation.validation_no_cfg_until_timestep
        return one_pass_in_first_steps(pipeline.transformer, steps=steps)

    def _shift(self, *, num_tokens: int) -> float:
        return shift_at(self.noise, self.components.scheduler.config, num_tokens=num_tokens)

    def _attention_arguments(self, text: TextEmbeds, *, num_tokens: int) -> dict[str, Any]:
        """Attention mask without padding tokens, if the configuration wants it."""
        if not self.noise.flux_attention_masked_training:
            return {}
        mask = _mask(text).to(self.device)  # [B, L]
        image = mask.new_ones(len(mask), num_tokens)  # [B, N]
        return {"attention_mask": torch.cat([mask, image], dim=1)[:, None, None, :]}  # [B, 1, 1, L + N]

    def _attention_mask(self, prompts: Sequence[str]) -> Tensor:
        """[B, L] bool, false for T5 padding."""
        tokenizer, length = self.prompt_encoder.tokenizer_2, self.components.text_tokens
        with quiet():
            encoded = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
            self._script_warning.check(prompts, tokenizer)
        self._truncation_warning.check(prompts, lengths)
        mask: Tensor = encoded.attention_mask.bool()
        return mask


def _num_tokens(height_px: int, width_px: int) -> int:
    return height_px * width_px // (VAE_SCALE * PATCH) ** 2


def _pooled(text: TextEmbeds) -> Tensor:
    assert text.pooled is not None, "Flux.1 needs pooled embeddings"
    return text.pooled


def _mask(text: TextEmbeds) -> Tensor:
    assert text.attention_mask is not None, "Flux.1 needs an attention mask"
    return text.attention_mask
