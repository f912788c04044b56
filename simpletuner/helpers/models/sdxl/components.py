"""Finds the components of an SDXL model and checks that they fit together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.component_checks import (
    ModelComponents,
    base_source,
    check_classes,
    check_fit,
    config_number,
    read_index,
    swappable_component,
    vae_of,
)
from simpletuner.helpers.models.diffusion import DiffusionPrediction
from simpletuner.helpers.models.loading import Component, ModelSource, find_component, find_in_file
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.single_file import names_in
from simpletuner.helpers.models.weights_on_disk import VELOCITY_MARKER, ZERO_SNR_MARKER

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.model import ModelConfig

PIPELINES = ("StableDiffusionXL*",)
TEXT_ENCODER_PREFIXES = {
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
"""Prefixes of their tensors in a single file of the original layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SDXLComponents(ModelComponents):
    """Components of an SDXL model; the denoiser is a UNet."""

    text_encoder: Component
    text_encoder_2: Component
    tokenizer: Component
    tokenizer_2: Component
    empty_prompt_is_zero: bool
    """Whether the embeds of the empty prompt are zeros."""

    @property
    def scheduler_is_zero_snr(self) -> bool:
        """Whether the model's schedule ends at an SNR of zero."""
        return self.scheduler.config.get("rescale_betas_zero_snr") is True

    def prediction_type(self, configured: str | None) -> DiffusionPrediction:
        """The configured prediction type, else that of the model's scheduler.

        Raises:
            ModelError: The family cannot train this type.
        """
        found = configured or self.scheduler.config.get("prediction_type", "epsilon")
        if found == "epsilon":
            return "epsilon"
        if found == "v_prediction":
            return "v_prediction"
        raise ModelError(
            f"{self.scheduler.source}: prediction_type {found!r} cannot be trained, only "
            f"{', '.join(SPEC.prediction_types)}. Set prediction_type, or give another model."
        )


def find_components(model: ModelConfig) -> SDXLComponents:
    """Find every component, downloading missing files, and check that they are SDXL's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository is unreachable.
    """
    base, file = base_source(model), None
    if base.is_file:
        base, file = _configuration_of(model), base
    index = read_index(base, pipelines=PIPELINES, family="SDXL")
    components = SDXLComponents(
        denoiser=swappable_component(
            "unet",
            base,
            own=model.pretrained_unet_model_name_or_path,
            subfolder=model.pretrained_unet_subfolder,
            file=file,
        ),
        vae=vae_of(model, base, file=file),
        text_encoder=_text_encoder("text_encoder", base, file),
        text_encoder_2=_text_encoder("text_encoder_2", base, file),
        tokenizer=find_component("tokenizer", base, component_type="tokenizer"),
        tokenizer_2=find_component("tokenizer_2", base, component_type="tokenizer"),
        scheduler=_scheduler(base, file),
        empty_prompt_is_zero=index.get("force_zeros_for_empty_prompt") is not False,
    )
    check_classes(
        {
            "UNet2DConditionModel": components.denoiser,
            "AutoencoderKL": components.vae,
            "CLIPTextModel": components.text_encoder,
            "CLIPTextModelWithProjection": components.text_encoder_2,
        },
        family="SDXL",
    )
    _check_fit(components)
    return components


def _configuration_of(model: ModelConfig) -> ModelSource:
    """Source of a single file's configuration, tokenizers and scheduler."""
    if model.pretrained_config_name_or_path is not None:
        return ModelSource(
            model.pretrained_config_name_or_path,
            key="pretrained_config_name_or_path",
            revision=model.revision,
        )
    flavour = model.model_flavour or SPEC.default_flavour
    return ModelSource(SPEC.flavours[flavour], key="model_flavour", revision=model.revision)


def _text_encoder(name: str, base: ModelSource, file: ModelSource | None) -> Component:
    if file is None:
        return find_component(name, base, component_type="transformers")
    return find_in_file(name, file, prefix=TEXT_ENCODER_PREFIXES[name], configuration=base)


def _scheduler(base: ModelSource, file: ModelSource | None) -> Component:
    """The base's scheduler, with the settings that empty tensors in a single file mark."""
    scheduler = find_component("scheduler", base, component_type="scheduler")
    if file is None:
        return scheduler
    names, config = names_in(Path(file.where)), dict(scheduler.config)
    if VELOCITY_MARKER in names:
        config["prediction_type"] = "v_prediction"
    if ZERO_SNR_MARKER in names:
        config["rescale_betas_zero_snr"] = True
    return replace(scheduler, config=config)


def _check_fit(components: SDXLComponents) -> None:
    """Refuse components whose widths differ, such as the refiner's or an inpainting UNet."""
    check_fit(
        components.scheduler,
        {"num_train_timesteps": (SPEC.num_train_timesteps, "number that SDXL needs")},
        advice="Give an SDXL model.",
    )
    unet, text, text_2 = components.denoiser, components.text_encoder, components.text_encoder_2
    if (found := unet.config.get("addition_embed_type")) != "text_time":
        raise ModelError(
            f"{unet.source}: {unet.folder} is a UNet without SDXL's size and text conditioning "
            f"(addition_embed_type {found!r}, not 'text_time'). Give an SDXL model."
        )
    text_width = config_number(text, "hidden_size") + config_number(text_2, "hidden_size")
    added_width = 6 * config_number(unet, "addition_time_embed_dim") + config_number(text_2, "projection_dim")
    check_fit(
        unet,
        {
            "in_channels": (config_number(components.vae, "latent_channels"), "number of the VAE's channels"),
            "cross_attention_dim": (text_width, "width of both text encoders"),
            "projection_class_embeddings_input_dim": (
                added_width,
                "width of six size values and the pooled text",
            ),
        },
        advice="Refiners and inpainting UNets cannot be trained; give the components of one SDXL base model.",
    )
