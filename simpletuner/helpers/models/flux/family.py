"""Flux.1: packed latents and T5 tokens in one transformer, conditioned on pooled CLIP text and guidance.

Shapes: B batch, C latent channels, h w latent height and width, N image tokens, L text tokens, D text width,
P pooled width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from simpletuner.helpers.contracts import Batch, ModelSpec, NoisyBatch, PipelineKind, Size, TextEmbeds
from simpletuner.helpers.models.autoencoder import (
    Float32Autoencoder,
    encode_scaled,
    load_autoencoder,
    vae_identity,
)
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flow_matching import (
    add_noise,
    distribution_of,
    draw_guidance,
    sampling_sigmas,
    shift_at,
    timestep_input,
    unshifted_sampler,
)
from simpletuner.helpers.models.flux.components import PATCH, FluxParts, find_parts
from simpletuner.helpers.models.flux.pipeline import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from simpletuner.helpers.models.flux.spec import SPEC
from simpletuner.helpers.models.key_groups import NO_GUIDANCE
from simpletuner.helpers.models.loading import Loadable, load_weights, quiet
from simpletuner.helpers.models.quantisation import quantize_and_move_text_encoder, text_precision_identity
from simpletuner.helpers.models.text import TruncationWarning, check_finite_text

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import (
        ModelConfig,
        NoiseConfig,
        PrecisionConfig,
        ValidationConfig,
    )

logger = logging.getLogger(__name__)

PIPELINES: dict[PipelineKind, type[diffusers.DiffusionPipeline]] = {
    "text2image": FluxPipeline,
    "image2image": FluxImg2ImgPipeline,
    "inpaint": FluxInpaintPipeline,
}
VAE_SCALE = 8
"""Pixels along the edge of a latent position."""


class Flux(ModelFamily):
    """Flux.1 dev, schnell, Krea and models of their shape."""

    spec: ClassVar[ModelSpec] = SPEC

    def __init__(
        self,
        model: ModelConfig,
        *,
        noise: NoiseConfig,
        precision: PrecisionConfig,
        device: torch.device,
        weight_dtype: torch.dtype,
    ) -> None:
        """Find every part of the model and check that the parts fit; a repository is downloaded here."""
        super().__init__(model, noise=noise, precision=precision, device=device, weight_dtype=weight_dtype)
        self._parts: FluxParts = find_parts(model)
        self._distribution = distribution_of(noise)
        self._vae: Float32Autoencoder | None = None
        self._encoder: diffusers.FluxPipeline | None = None
        asks_for = {key: value for key, value in noise if key in NO_GUIDANCE}
        if not self._parts.has_guidance and asks_for != NO_GUIDANCE:
            logger.warning("This model is told no guidance: what flux_guidance_* asks for has no effect.")
        self._cut_captions = TruncationWarning(limit=self._parts.text_tokens, reader="T5 sees")

    @cached_property
    def vae_identity(self) -> str:
        """Changes with the VAE's configuration, its weights and how it is run."""
        return vae_identity(self._parts.vae, precision=self.precision)

    @cached_property
    def text_identity(self) -> str:
        """Changes with both tokenizers, both text encoders, their precision and the length of captions."""
        parts = self._parts
        components = (parts.tokenizer, parts.text_encoder, parts.tokenizer_2, parts.text_encoder_2)
        identities = " ".join(component.identity() for component in components)
        precisions = text_precision_identity(self.precision)
        return f"{identities} {self.weight_dtype} {parts.text_tokens}{precisions}"

    def load_vae(self) -> None:
        """Load the VAE to the device in float32; does nothing when it is there."""
        if self._vae is None:
            vae = load_autoencoder(Float32Autoencoder, self._parts.vae, precision=self.precision)
            self._vae = vae.to(self.device)

    def unload_vae(self) -> None:
        """Free the VAE."""
        self._vae = None
        self._release_memory()

    def load_text_encoders(self) -> None:
        """Load CLIP and T5 to the device in weight_dtype; does nothing when they are there."""
        if self._encoder is not None:
            return
        parts, dtype = self._parts, self.weight_dtype
        text_encoder = load_weights(cast(Loadable, CLIPTextModel), parts.text_encoder, dtype=dtype)
        text_encoder_2 = load_weights(cast(Loadable, T5EncoderModel), parts.text_encoder_2, dtype=dtype)
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(str(parts.tokenizer.folder), local_files_only=True)
            tokenizer_2 = T5Tokenizer.from_pretrained(str(parts.tokenizer_2.folder), local_files_only=True)
            self._encoder = diffusers.FluxPipeline(
                vae=None,
                text_encoder=quantize_and_move_text_encoder(
                    text_encoder, 1, self.precision, device=self.device
                ),
                text_encoder_2=quantize_and_move_text_encoder(
                    text_encoder_2, 2, self.precision, device=self.device
                ),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer_2,
                transformer=None,
                scheduler=None,
            )

    def unload_text_encoders(self) -> None:
        """Free the text encoders."""
        self._encoder = None
        self._release_memory()

    def load_denoiser(self) -> FluxTransformer2DModel:
        """The transformer, frozen, on `denoiser_device` in weight_dtype; the caller keeps it."""
        transformer = load_weights(
            cast(Loadable, FluxTransformer2DModel), self._parts.transformer, dtype=self.weight_dtype
        )
        assert isinstance(transformer, FluxTransformer2DModel)
        return transformer.requires_grad_(False).to(self.denoiser_device)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, 16, H/8, W/8] float32 latents on the device.

        Raises:
            DataError: The VAE produced a value that is not finite.
        """
        assert self._vae is not None, "load_vae comes first"
        return encode_scaled(self._vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] tokens, their [1, L] mask and [1, P] in weight_dtype on the CPU.

        Raises:
            DataError: A text encoder produced a value that is not finite.
        """
        assert self._encoder is not None, "load_text_encoders comes first"
        length = self._parts.text_tokens
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), quiet():
            tokens, pooled, _ = self._encoder.encode_prompt(
                prompt=list(prompts), device=self.device, max_sequence_length=length
            )
        mask = self._token_masks(prompts)
        embeds = []
        for index, prompt in enumerate(prompts):
            rows = slice(index, index + 1)
            check_finite_text(prompt, tokens[rows], pooled[rows], dtype=self.weight_dtype)
            embeds.append(
                TextEmbeds(
                    prompt_embeds=tokens[rows].cpu().clone(),
                    pooled=pooled[rows].cpu().clone(),
                    attention_mask=mask[rows].clone(),
                )
            )
        return embeds

    def add_noise(self, latents: Tensor, *, sample_indices: Sequence[int], seed: int) -> NoisyBatch:
        """Noise [B, C, h, w] latents as a function of the seed and each sample's position alone."""
        height, width = latents.shape[-2:]
        noised = add_noise(
            latents.to(self.device),
            distribution=self._distribution,
            shift=self._shift(num_tokens=height * width // PATCH**2),
            sample_indices=sample_indices,
            seed=seed,
        )
        if not self._parts.has_guidance:
            return noised
        return replace(noised, guidance=draw_guidance(self.noise, sample_indices=sample_indices, seed=seed))

    def predict(self, denoiser: nn.Module, noised: NoisyBatch, batch: Batch) -> Tensor:
        """Run the transformer on a noised batch; [B, C, h, w] float32: the velocity from image to noise."""
        assert noised.sigmas is not None, "a flow-matching batch has noise levels"
        height, width = noised.latents.shape[-2:]
        text = batch.text
        prediction: Tensor = denoiser(
            hidden_states=pack(noised.latents).to(self.device, self.weight_dtype),
            timestep=timestep_input(noised.sigmas, dtype=self.weight_dtype).to(self.device),
            guidance=None if noised.guidance is None else torch.tensor(noised.guidance, device=self.device),
            pooled_projections=_pooled(text).to(self.device, self.weight_dtype),
            encoder_hidden_states=text.prompt_embeds.to(self.device, self.weight_dtype),
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3, device=self.device),
            img_ids=image_ids(height // PATCH, width // PATCH, device=self.device),
            joint_attention_kwargs=self._attention_arguments(text, num_tokens=height * width // PATCH**2),
            return_dict=False,
        )[0]
        return unpack(prediction.float(), height=height // PATCH)

    def make_pipeline(
        self, denoiser: nn.Module, kind: PipelineKind = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline around this very transformer, without text encoders.

        Its scheduler takes noise levels as they are given: `pipeline_inputs` shifts them as training does.

        Args:
            denoiser: Used as it is, with whatever adapter is attached to it.
            kind: What the pipeline starts from.
            scheduler: Name of a sampler for flow matching; None takes Euler's method.
        """
        self.load_vae()
        with quiet():
            pipeline = PIPELINES[kind](
                vae=self._vae,
                text_encoder=None,
                text_encoder_2=None,
                tokenizer=None,
                tokenizer_2=None,
                transformer=denoiser,
                scheduler=unshifted_sampler(self._parts.scheduler, name=scheduler),
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, pictures: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompts on the device, guidance, shifted noise levels."""
        num_tokens = size.height * size.width // (VAE_SCALE * PATCH) ** 2
        tensors = {"prompt_embeds": prompt.prompt_embeds, "pooled_prompt_embeds": _pooled(prompt)}
        if pictures.validation_guidance_real > 1:
            tensors |= {
                "negative_prompt_embeds": negative.prompt_embeds,
                "negative_pooled_prompt_embeds": _pooled(negative),
            }
        shift = self._shift(num_tokens=num_tokens)
        return {
            **{name: tensor.to(self.device, self.weight_dtype) for name, tensor in tensors.items()},
            "guidance_scale": pictures.validation_guidance,
            "true_cfg_scale": pictures.validation_guidance_real,
            "sigmas": sampling_sigmas(pictures.validation_num_inference_steps, shift),
            "joint_attention_kwargs": self._attention_arguments(prompt, num_tokens=num_tokens),
        }

    def _shift(self, *, num_tokens: int) -> float:
        return shift_at(self.noise, self._parts.scheduler.config, num_tokens=num_tokens)

    def _attention_arguments(self, text: TextEmbeds, *, num_tokens: int) -> dict[str, Any]:
        """The mask that leaves out the padding of captions, where it is wanted."""
        if not self.noise.flux_attention_masked_training:
            return {}
        real = _mask(text).to(self.device)  # [B, L]
        image = real.new_ones(len(real), num_tokens)  # [B, N]
        return {"attention_mask": torch.cat([real, image], dim=1)[:, None, None, :]}  # [B, 1, 1, L + N]

    def _token_masks(self, prompts: Sequence[str]) -> Tensor:
        """[B, L] true where a T5 token is not padding."""
        assert self._encoder is not None
        tokenizer, length = self._encoder.tokenizer_2, self._parts.text_tokens
        with quiet():
            encoded = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
        self._cut_captions.check(prompts, lengths)
        mask: Tensor = encoded.attention_mask.bool()
        return mask


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, hw/4, 4C]: each 2 x 2 patch becomes one token."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, *, height: int) -> Tensor:
    """[B, N, 4C] -> [B, C, h, w], where height is the number of rows of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=PATCH, q=PATCH)


def image_ids(height: int, width: int, *, device: torch.device) -> Tensor:
    """[N, 3] float32: 0, row and column of each image token."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)


def _pooled(text: TextEmbeds) -> Tensor:
    assert text.pooled is not None, "Flux.1 needs pooled embeddings"
    return text.pooled


def _mask(text: TextEmbeds) -> Tensor:
    assert text.attention_mask is not None, "Flux.1's embeddings have a mask"
    return text.attention_mask
