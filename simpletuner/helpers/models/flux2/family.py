"""Flux.2: normalised latent patches and hidden states of Mistral or Qwen in one transformer.

Shapes: B batch, C latent channels, h w latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import AutoTokenizer

from simpletuner.helpers.contracts import Batch, NoisyBatch, PipelineType, Size, TextEmbeds
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.models.flow_matching import (
    add_noise,
    distribution_of,
    draw_guidance,
    sampling_sigmas,
    timestep_input,
    unshifted_sampler,
)
from simpletuner.helpers.models.flux2.components import KLEIN, Flux2Components, find_components
from simpletuner.helpers.models.flux2.latents import (
    PIXELS_PER_TOKEN,
    Float32Flux2Autoencoder,
    encode_normalised,
    from_tokens,
    ids_of_images,
    pack_images,
)
from simpletuner.helpers.models.flux2.spec import SHIFT_STEPS, SPEC, training_shift
from simpletuner.helpers.models.loading import quiet
from simpletuner.helpers.models.shift import static_shift
from simpletuner.helpers.models.text import TruncationWarning, check_finite_text

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig

TEXT_TOKENS = 512
"""Tokens of a prompt in its chat template, after padding and truncation."""


class Flux2(ModelFamily):
    """Flux.2 dev and Klein."""

    spec = SPEC
    components: Flux2Components
    denoiser_class = Flux2Transformer2DModel
    vae_class = Float32Flux2Autoencoder

    def __init__(self, context: FamilyContext) -> None:
        super().__init__(context)
        self.components = find_components(context.model)
        self._distribution = distribution_of(context.noise)
        self._truncation_warning = TruncationWarning(
            limit=TEXT_TOKENS, encoder="the text encoder, with the chat template,"
        )

    @cached_property
    def text_identity(self) -> str:
        """Text that changes with tokenizer, text encoder, its hidden states, precision, number of tokens."""
        parts = self.components
        return self._text_identity(
            parts.tokenizer,
            parts.text_encoder,
            settings=f"{parts.variant.hidden_states} {self.weight_dtype} {TEXT_TOKENS}",
        )

    def make_prompt_encoder(self) -> diffusers.DiffusionPipeline:
        """The bundled pipeline with nothing but tokenizer and text encoder.

        Raises:
            ModelError: The tokenizer has no chat template, or a file is damaged.
        """
        parts = self.components
        encoder = self._load_text_encoder(parts.variant.text_encoder, parts.text_encoder, number=1)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(parts.tokenizer.folder), local_files_only=True)
            if tokenizer.chat_template is None:
                raise ModelError(
                    f"{parts.tokenizer.source}: {parts.tokenizer.folder} has no chat template for prompts. "
                    "Download the model again."
                )
            return parts.variant.pipelines["text2image"](
                vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None, scheduler=None
            )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode [B, 3, H, W] pixels in [-1, 1] to normalised [B, 128, H/16, W/16] float32 latents.

        Raises:
            DataError: A latent is not finite.
        """
        return encode_normalised(self.vae, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> list[TextEmbeds]:
        """Encode each prompt to [1, L, D] in weight_dtype on the CPU.

        Raises:
            DataError: An embedding is not finite.
        """
        self._warn_of_long_prompts(prompts)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), quiet():
            prompt_embeds, _ = self.prompt_encoder.encode_prompt(
                prompt=list(prompts),
                device=self.device,
                max_sequence_length=TEXT_TOKENS,
                text_encoder_out_layers=self.components.variant.hidden_states,
            )
        for prompt, encoded in zip(prompts, prompt_embeds, strict=True):
            check_finite_text(prompt, encoded, dtype=self.weight_dtype)
        return [TextEmbeds(prompt_embeds=each.cpu().clone()) for each in prompt_embeds.split(1)]

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
            shift=self._training_shift(num_tokens=height * width),
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
        device, dtype = self.device, self.weight_dtype
        images, prompt_embeds = (noisy.latents, *batch.references), batch.text.prompt_embeds
        prediction: Tensor = denoiser(
            hidden_states=pack_images([each.to(device, dtype) for each in images]),
            timestep=timestep_input(noisy.sigmas, dtype=dtype).to(device),
            guidance=None if noisy.guidance is None else torch.tensor(noisy.guidance, device=device),
            encoder_hidden_states=prompt_embeds.to(device, dtype),
            txt_ids=diffusers.Flux2Pipeline._prepare_text_ids(prompt_embeds).to(device),
            img_ids=ids_of_images(images).to(device),
            return_dict=False,
        )[0]
        height, width = noisy.latents.shape[-2:]
        return from_tokens(prediction[:, : height * width].float(), height=height)

    def make_pipeline(
        self, denoiser: nn.Module, pipeline_type: PipelineType = "text2image", *, scheduler: str | None = None
    ) -> diffusers.DiffusionPipeline:
        """The bundled pipeline with this transformer, without text encoder; its images are references.

        Its scheduler does not shift sigmas: `pipeline_inputs` passes them with the shift of training.

        Raises:
            ModelError: This variant has no such pipeline.
        """
        variant, options = self.components.variant, {}
        if pipeline_type not in variant.pipelines:
            raise ModelError(
                f"{variant.name} has no {pipeline_type} pipeline, only {', '.join(variant.pipelines)}. "
                "Use one of these, or Klein."
            )
        if variant is KLEIN:
            options = {"is_distilled": self.components.is_distilled}
        return self._new_pipeline(
            variant.pipelines[pipeline_type],
            text_encoder=None,
            tokenizer=None,
            transformer=denoiser,
            scheduler=unshifted_sampler(self.components.scheduler, name=scheduler),
            **options,
        )

    @property
    def pipelines(self) -> Mapping[PipelineType, type[diffusers.DiffusionPipeline]]:
        """The bundled pipelines, by their input."""
        return self.components.variant.pipelines

    def pipeline_inputs(
        self,
        prompt: TextEmbeds,
        negative: TextEmbeds,
        *,
        validation: ValidationConfig,
        size: Size,
        references: Sequence[Tensor] = (),
    ) -> dict[str, object]:
        """Keyword arguments of the pipeline's call: prompt embeds, guidance, shifted sigmas, references.

        dev has a guidance embedding and no negative prompt; a distilled Klein has neither.
        """
        shift = self._shift(num_tokens=size.height * size.width // PIXELS_PER_TOKEN)
        inputs: dict[str, object] = {
            "prompt_embeds": prompt.prompt_embeds.to(self.device, self.weight_dtype),
            "guidance_scale": 1.0 if self.components.is_distilled else validation.validation_guidance,
            "sigmas": sampling_sigmas(validation.validation_num_inference_steps, shift),
        }
        if self.components.variant is KLEIN and not self.components.is_distilled:
            inputs["negative_prompt_embeds"] = negative.prompt_embeds.to(self.device, self.weight_dtype)
        if references:  # the pipeline takes images, and encodes them as encode_images does
            inputs["image"] = [VaeImageProcessor().postprocess(each[None])[0] for each in references]
        return inputs

    def _shift(self, *, num_tokens: int) -> float:
        fixed = static_shift(self.noise, self.components.scheduler.config)
        return math.exp(compute_empirical_mu(num_tokens, SHIFT_STEPS)) if fixed is None else fixed

    def _training_shift(self, *, num_tokens: int) -> float:
        is_fixed = static_shift(self.noise, self.components.scheduler.config) is not None
        own = None if is_fixed else training_shift(dict(self.noise), num_tokens)
        return self._shift(num_tokens=num_tokens) if own is None else own

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        variant = self.components.variant
        with quiet():
            encoded = self.prompt_encoder.tokenizer.apply_chat_template(
                variant.conversations(list(prompts)), tokenize=True, return_dict=True, **variant.chat_options
            )
        self._truncation_warning.check(prompts, [len(ids) for ids in encoded["input_ids"]])
