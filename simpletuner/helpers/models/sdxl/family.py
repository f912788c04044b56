"""SDXL: a UNet with two CLIP text encoders, told the size and the crop of each image.

Shapes: B batch, L text tokens, D text width, P pooled width, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, cast

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from simpletuner.helpers.contracts import Batch, ModelSpec, NoisyBatch, PipelineKind, Sample, Size, TextEmbeds
from simpletuner.helpers.models.autoencoder import (
    Float32Autoencoder,
    encode_scaled,
    load_autoencoder,
    vae_identity,
)
from simpletuner.helpers.models.diffusion import DiffusionPrediction, DiffusionSchedule, add_noise
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.loading import Loadable, load_weights, quiet
from simpletuner.helpers.models.quantisation import quantize_and_move_text_encoder, text_precision_identity
from simpletuner.helpers.models.schedulers import make_sampler, training_alpha_bars
from simpletuner.helpers.models.sdxl.components import SDXLParts, find_parts
from simpletuner.helpers.models.sdxl.pipeline import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.text import TruncationWarning, check_finite_text

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import (
        ModelConfig,
        NoiseConfig,
        PrecisionConfig,
        ValidationConfig,
    )

CLIP_TOKENS = 77
"""Length that captions are padded and cut to."""
PIPELINES: dict[PipelineKind, type[diffusers.DiffusionPipeline]] = {
    "text2image": StableDiffusionXLPipeline,
    "image2image": StableDiffusionXLImg2ImgPipeline,
    "inpaint": StableDiffusionXLInpaintPipeline,
}


class SDXL(ModelFamily):
    """Stable Diffusion XL and models of its shape."""

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
        self._parts: SDXLParts = find_parts(model)
        self._prediction: DiffusionPrediction = self._parts.prediction_type(model.prediction_type)
        self._zero_snr = model.rescale_betas_zero_snr or self._parts.scheduler_is_zero_snr
        self._schedule = DiffusionSchedule(
            training_alpha_bars(self._parts.scheduler, zero_snr=self._zero_snr),
            prediction=self._prediction,
            snr_gamma=noise.snr_gamma,
        )
        self._vae: Float32Autoencoder | None = None
        self._encoder: diffusers.StableDiffusionXLPipeline | None = None
        self._cut_captions = TruncationWarning(limit=CLIP_TOKENS)

    @cached_property
    def vae_identity(self) -> str:
        """Changes with the VAE's configuration, its weights and how it is run."""
        return vae_identity(self._parts.vae, precision=self.precision)

    @cached_property
    def text_identity(self) -> str:
        """Changes with both tokenizers, both text encoders, their precision and the meaning of no prompt."""
        parts = self._parts
        components = (parts.tokenizer, parts.text_encoder, parts.tokenizer_2, parts.text_encoder_2)
        identities = " ".join(component.identity() for component in components)
        precisions = text_precision_identity(self.precision)
        return f"{identities} {self.weight_dtype} zeros={parts.empty_prompt_is_zero}{precisions}"

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
        """Load both text encoders to the device in weight_dtype; does nothing when they are there."""
        if self._encoder is not None:
            return
        parts, dtype = self._parts, self.weight_dtype
        text_encoder = load_weights(cast(Loadable, CLIPTextModel), parts.text_encoder, dtype=dtype)
        text_encoder_2 = load_weights(
            cast(Loadable, CLIPTextModelWithProjection), parts.text_encoder_2, dtype=dtype
        )
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(str(parts.tokenizer.folder), local_files_only=True)
            tokenizer_2 = CLIPTokenizer.from_pretrained(str(parts.tokenizer_2.folder), local_files_only=True)
            self._encoder = diffusers.StableDiffusionXLPipeline(
                vae=None,
                text_encoder=quantize_and_move_text_encoder(
                    text_encoder, 1, self.precision, device=self.device
                ),
                text_encoder_2=quantize_and_move_text_encoder(
                    text_encoder_2, 2, self.precision, device=self.device
                ),
                tokenizer=tokenizer,
                tokenizer_2=tokenizer_2,
                unet=None,
                scheduler=None,
                force_zeros_for_empty_prompt=parts.empty_prompt_is_zero,
                add_watermarker=False,
            )

    def unload_text_encoders(self) -> None:
        """Free the text encoders."""
        self._encoder = None
        self._release_memory()

    def load_denoiser(self) -> UNet2DConditionModel:
        """The UNet, frozen, on `denoiser_device` in weight_dtype; the caller keeps it."""
        unet = load_weights(cast(Loadable, UNet2DConditionModel), self._parts.unet, dtype=self.weight_dtype)
        assert isinstance(unet, UNet2DConditionModel)
        return unet.requires_grad_(False).to(self.denoiser_device)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to scaled [B, 4, H/8, W/8] float32 latents on the device.

        Raises:
            DataError: The VAE produced a value that is not finite.
        """
        assert self._vae is not None, "load_vae comes first"
        return encode_scaled(self._vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] and [1, P] float32 on the CPU.

        The empty prompt gives what the pipeline itself takes when it is given no negative prompt: zeros if
        the model says so, which is how SDXL was trained without a caption, else the encoding of "".

        Raises:
            DataError: A text encoder produced a value that is not finite.
        """
        assert self._encoder is not None, "load_text_encoders comes first"
        with quiet():
            lengths = [len(ids) for ids in self._encoder.tokenizer(list(prompts)).input_ids]
        self._cut_captions.check(prompts, lengths)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), quiet():
            tokens, no_tokens, pooled, no_pooled = self._encoder.encode_prompt(
                prompt=list(prompts), device=self.device, negative_prompt=None
            )
        embeds = []
        for index, prompt in enumerate(prompts):
            chosen, chosen_pooled = (tokens, pooled) if prompt else (no_tokens, no_pooled)
            rows = slice(index, index + 1)
            embeds.append(
                TextEmbeds(prompt_embeds=_to_host(chosen[rows]), pooled=_to_host(chosen_pooled[rows]))
            )
            check_finite_text(prompt, chosen[rows], chosen_pooled[rows], dtype=self.weight_dtype)
        return embeds

    def add_noise(self, latents: Tensor, *, sample_indices: Sequence[int], seed: int) -> NoisyBatch:
        """Noise [B, 4, h, w] latents as a function of the seed and each sample's position alone."""
        return add_noise(
            latents.to(self.device), schedule=self._schedule, sample_indices=sample_indices, seed=seed
        )

    def predict(self, denoiser: nn.Module, noised: NoisyBatch, batch: Batch) -> Tensor:
        """Run the UNet on a noised batch; [B, 4, h, w] float32: the noise, or the velocity."""
        prediction: Tensor = denoiser(
            noised.latents.to(self.device, self.weight_dtype),
            torch.tensor(noised.timesteps, dtype=torch.int64, device=self.device),
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
        self, denoiser: nn.Module, kind: PipelineKind = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline around this very UNet, without text encoders and without watermark.

        Args:
            denoiser: Used as it is, with whatever adapter is attached to it.
            kind: What the pipeline starts from.
            scheduler: One of the sampler names; None takes the model's own.

        Raises:
            ModelError: The scheduler is not known.
        """
        sampler = make_sampler(
            self._parts.scheduler, name=scheduler, prediction=self._prediction, zero_snr=self._zero_snr
        )
        self.load_vae()
        with quiet():
            pipeline = PIPELINES[kind](
                vae=self._vae,
                text_encoder=None,
                text_encoder_2=None,
                tokenizer=None,
                tokenizer_2=None,
                unet=denoiser,
                scheduler=sampler,
                force_zeros_for_empty_prompt=self._parts.empty_prompt_is_zero,
                add_watermarker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, pictures: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: encoded prompts on the device, and guidance."""
        tensors = {
            "prompt_embeds": prompt.prompt_embeds,
            "pooled_prompt_embeds": _pooled(prompt),
            "negative_prompt_embeds": negative.prompt_embeds,
            "negative_pooled_prompt_embeds": _pooled(negative),
        }
        rescale = pictures.validation_guidance_rescale
        return {
            **{name: tensor.to(self.device, self.weight_dtype) for name, tensor in tensors.items()},
            "guidance_scale": pictures.validation_guidance,
            # Only named when used: the pipelines that start from an image have not got it.
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
