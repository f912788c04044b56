"""Flux.2: normalised latent patches and hidden states of Mistral or Qwen in one transformer.

Shapes: B batch, C latent channels, h w latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import AutoTokenizer

from simpletuner.helpers.contracts import Batch, ModelSpec, NoisyBatch, PipelineKind, Size, TextEmbeds
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.autoencoder import load_autoencoder, vae_identity
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flow_matching import (
    add_noise,
    distribution_of,
    draw_guidance,
    sampling_sigmas,
    static_shift,
    timestep_input,
    unshifted_sampler,
)
from simpletuner.helpers.models.flux2.components import KLEIN, Flux2Parts, find_parts
from simpletuner.helpers.models.flux2.latents import (
    PIXELS_PER_TOKEN,
    Float32Flux2Autoencoder,
    encode_normalised,
    from_tokens,
    to_tokens,
)
from simpletuner.helpers.models.flux2.spec import SPEC
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

TEXT_TOKENS = 512
"""Length that captions, with the conversation around them, are padded and cut to."""
SHIFT_STEPS = 50
"""Number of steps that the shift is made for. The pipelines change it with the number of steps; what a model
is trained on cannot, so the pipelines' default number stands for all."""


class Flux2(ModelFamily):
    """Flux.2 dev and Klein."""

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
        self._parts: Flux2Parts = find_parts(model)
        self._distribution = distribution_of(noise)
        self._vae: Float32Flux2Autoencoder | None = None
        self._encoder: Any = None  # a Flux2Pipeline or a Flux2KleinPipeline
        self._cut_captions = TruncationWarning(
            limit=TEXT_TOKENS, reader="with the conversation around it, the text encoder sees"
        )

    @cached_property
    def vae_identity(self) -> str:
        """Changes with the VAE's configuration, its weights and how it is run."""
        return vae_identity(self._parts.vae, precision=self.precision)

    @cached_property
    def text_identity(self) -> str:
        """Changes with the tokenizer, the text encoder, its precision and the length of captions."""
        parts = self._parts
        encoder = f"{parts.tokenizer.identity()} {parts.text_encoder.identity()}"
        precision = text_precision_identity(self.precision)
        return f"{encoder} {parts.kind.text_states} {self.weight_dtype} {TEXT_TOKENS}{precision}"

    def load_vae(self) -> None:
        """Load the VAE to the device in float32; does nothing when it is there."""
        if self._vae is None:
            vae = load_autoencoder(Float32Flux2Autoencoder, self._parts.vae, precision=self.precision)
            self._vae = vae.to(self.device)

    def unload_vae(self) -> None:
        """Free the VAE."""
        self._vae = None
        self._release_memory()

    def load_text_encoders(self) -> None:
        """Load tokenizer and text encoder to the device in weight_dtype; does nothing when they are there."""
        if self._encoder is not None:
            return
        kind, folder = self._parts.kind, self._parts.tokenizer.folder
        encoder = load_weights(
            cast(Loadable, kind.text_encoder), self._parts.text_encoder, dtype=self.weight_dtype
        )
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            if tokenizer.chat_template is None:
                raise ModelError(
                    f"{self._parts.tokenizer.source}: {folder} has no chat template, which captions are put "
                    "into. Fetch the model again."
                )
            self._encoder = kind.pipelines["text2image"](
                vae=None,
                text_encoder=quantize_and_move_text_encoder(encoder, 1, self.precision, device=self.device),
                tokenizer=tokenizer,
                transformer=None,
                scheduler=None,
            )

    def unload_text_encoders(self) -> None:
        """Free the text encoder."""
        self._encoder = None
        self._release_memory()

    def load_denoiser(self) -> Flux2Transformer2DModel:
        """The transformer, frozen, on `denoiser_device` in weight_dtype; the caller keeps it."""
        transformer = load_weights(
            cast(Loadable, Flux2Transformer2DModel), self._parts.transformer, dtype=self.weight_dtype
        )
        assert isinstance(transformer, Flux2Transformer2DModel)
        return transformer.requires_grad_(False).to(self.denoiser_device)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to normalised [B, 128, H/16, W/16] float32 latents.

        Raises:
            DataError: The VAE produced a value that is not finite.
        """
        assert self._vae is not None, "load_vae comes first"
        return encode_normalised(self._vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] in weight_dtype on the CPU.

        Raises:
            DataError: The text encoder produced a value that is not finite.
        """
        assert self._encoder is not None, "load_text_encoders comes first"
        self._warn_of_long_prompts(prompts)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), quiet():
            tokens, _ = self._encoder.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                max_sequence_length=TEXT_TOKENS,
                text_encoder_out_layers=self._parts.kind.text_states,
            )
        for prompt, encoded in zip(prompts, tokens, strict=True):
            check_finite_text(prompt, encoded, dtype=self.weight_dtype)
        return [TextEmbeds(prompt_embeds=each.cpu().clone()) for each in tokens.split(1)]

    def add_noise(self, latents: Tensor, *, sample_indices: Sequence[int], seed: int) -> NoisyBatch:
        """Noise [B, C, h, w] latents as a function of the seed and each sample's position alone."""
        height, width = latents.shape[-2:]
        noised = add_noise(
            latents.to(self.device),
            distribution=self._distribution,
            shift=self._shift(num_tokens=height * width),
            sample_indices=sample_indices,
            seed=seed,
        )
        if not self._parts.has_guidance:
            return noised
        return replace(noised, guidance=draw_guidance(self.noise, sample_indices=sample_indices, seed=seed))

    def predict(self, denoiser: nn.Module, noised: NoisyBatch, batch: Batch) -> Tensor:
        """Run the transformer on a noised batch; [B, C, h, w] float32: the velocity from image to noise."""
        assert noised.sigmas is not None, "a flow-matching batch has noise levels"
        device, dtype, places = self.device, self.weight_dtype, self._parts.kind.pipelines["text2image"]
        tokens = batch.text.prompt_embeds
        prediction: Tensor = denoiser(
            hidden_states=to_tokens(noised.latents).to(device, dtype),
            timestep=timestep_input(noised.sigmas, dtype=dtype).to(device),
            guidance=None if noised.guidance is None else torch.tensor(noised.guidance, device=device),
            encoder_hidden_states=tokens.to(device, dtype),
            txt_ids=places._prepare_text_ids(tokens).to(device),
            img_ids=places._prepare_latent_ids(noised.latents).to(device),
            return_dict=False,
        )[0]
        return from_tokens(prediction.float(), height=noised.latents.shape[-2])

    def make_pipeline(
        self, denoiser: nn.Module, kind: PipelineKind = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline around this very transformer, without a text encoder.

        Its scheduler takes noise levels as they are given: `pipeline_inputs` shifts them as training does.

        Args:
            denoiser: Used as it is, with whatever adapter is attached to it.
            kind: What the pipeline starts from; images are its references.
            scheduler: Name of a sampler for flow matching; None takes Euler's method.

        Raises:
            ModelError: There is no pipeline of that kind.
        """
        pipelines = self._parts.kind.pipelines
        if kind not in pipelines:
            raise ModelError(
                f"{self._parts.kind.name} has no pipeline of the kind {kind}, only {', '.join(pipelines)}. "
                "Take one of these, or Klein."
            )
        self.load_vae()
        distilled = {"is_distilled": self._parts.is_distilled} if self._parts.kind is KLEIN else {}
        with quiet():
            pipeline = pipelines[kind](
                vae=self._vae,
                text_encoder=None,
                tokenizer=None,
                transformer=denoiser,
                scheduler=unshifted_sampler(self._parts.scheduler, name=scheduler),
                **distilled,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def pipeline_inputs(
        self, prompt: TextEmbeds, negative: TextEmbeds, *, pictures: ValidationConfig, size: Size
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompts on the device, guidance, shifted noise levels.

        dev is told the guidance and knows no negative prompt; a distilled Klein takes neither.
        """
        shift = self._shift(num_tokens=size.height * size.width // PIXELS_PER_TOKEN)
        inputs: dict[str, object] = {
            "prompt_embeds": prompt.prompt_embeds.to(self.device, self.weight_dtype),
            "guidance_scale": 1.0 if self._parts.is_distilled else pictures.validation_guidance,
            "sigmas": sampling_sigmas(pictures.validation_num_inference_steps, shift),
        }
        if self._parts.kind is KLEIN and not self._parts.is_distilled:
            inputs["negative_prompt_embeds"] = negative.prompt_embeds.to(self.device, self.weight_dtype)
        return inputs

    def _shift(self, *, num_tokens: int) -> float:
        fixed = static_shift(self.noise, self._parts.scheduler.config)
        return math.exp(compute_empirical_mu(num_tokens, SHIFT_STEPS)) if fixed is None else fixed

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        kind = self._parts.kind
        with quiet():
            encoded = self._encoder.tokenizer.apply_chat_template(
                kind.conversations(list(prompts)), tokenize=True, return_dict=True, **kind.chat_options
            )
        self._cut_captions.check(prompts, [len(ids) for ids in encoded["input_ids"]])
