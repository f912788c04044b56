"""The parts of one SDXL model: where each lies, and whether they belong together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.component_checks import base_source, swapped_or_own
from simpletuner.helpers.models.diffusion import DiffusionPrediction
from simpletuner.helpers.models.loading import (
    Component,
    ModelSource,
    class_of,
    find_component,
    find_in_file,
    read_model_index,
)
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.single_file import names_in

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ModelConfig

PIPELINE_PREFIX = "StableDiffusionXL"
TEXT_ENCODER_PREFIXES = {
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
"""Of their tensors in a checkpoint of the original layout."""
VELOCITY_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Names of empty tensors by which such a checkpoint says what its UNet predicts, and on which schedule."""


@dataclass(frozen=True, slots=True)
class SDXLParts:
    """Every component of an SDXL model."""

    unet: Component
    vae: Component
    text_encoder: Component
    text_encoder_2: Component
    tokenizer: Component
    tokenizer_2: Component
    scheduler: Component
    empty_prompt_is_zero: bool
    """Whether the model was trained with zeros in place of an empty prompt's encoding."""

    @property
    def scheduler_is_zero_snr(self) -> bool:
        """Whether the model's own schedule ends without any signal."""
        return self.scheduler.config.get("rescale_betas_zero_snr") is True

    def prediction_type(self, wanted: str | None) -> DiffusionPrediction:
        """What the UNet predicts: as wanted, or as the model's scheduler says.

        Raises:
            ModelError: It is something else than noise or velocity.
        """
        found = wanted or self.scheduler.config.get("prediction_type", "epsilon")
        if found == "epsilon":
            return "epsilon"
        if found == "v_prediction":
            return "v_prediction"
        raise ModelError(
            f"{self.scheduler.source}: prediction type {found!r} cannot be trained; this family knows "
            f"{', '.join(SPEC.prediction_types)}. Set prediction_type, or give another model."
        )


def find_parts(model: ModelConfig) -> SDXLParts:
    """Find every component, downloading what is not here, and check that they are SDXL's and fit together.

    Raises:
        ModelError: A component is missing or of another architecture, or the repository cannot be reached.
    """
    base, file = base_source(model), None
    if base.is_file:
        base, file = _configuration_of(model), base
    index = read_model_index(base)
    if not class_of(index).startswith(PIPELINE_PREFIX):
        raise ModelError(
            f"{base}: is a model for {class_of(index)}, not for {PIPELINE_PREFIX}Pipeline. "
            "Set model_family to that model's family, or give an SDXL model."
        )
    parts = SDXLParts(
        unet=_swapped_or_own(
            "unet",
            base,
            file,
            key="pretrained_unet_model_name_or_path",
            where=model.pretrained_unet_model_name_or_path,
            subfolder=model.pretrained_unet_subfolder,
        ),
        vae=_swapped_or_own(
            "vae",
            base,
            file,
            key="pretrained_vae_model_name_or_path",
            where=model.pretrained_vae_model_name_or_path,
            subfolder=model.pretrained_vae_subfolder,
        ),
        text_encoder=_text_encoder("text_encoder", base, file),
        text_encoder_2=_text_encoder("text_encoder_2", base, file),
        tokenizer=find_component("tokenizer", base, kind="tokenizer"),
        tokenizer_2=find_component("tokenizer_2", base, kind="tokenizer"),
        scheduler=_scheduler(base, file),
        empty_prompt_is_zero=index.get("force_zeros_for_empty_prompt") is not False,
    )
    _check_classes(parts)
    _check_fit(parts)
    return parts


def _configuration_of(model: ModelConfig) -> ModelSource:
    """Where a single file's configuration, tokenizers and scheduler come from."""
    if model.pretrained_config_name_or_path is not None:
        return ModelSource(
            model.pretrained_config_name_or_path,
            key="pretrained_config_name_or_path",
            revision=model.revision,
        )
    flavour = model.model_flavour or SPEC.default_flavour
    return ModelSource(SPEC.flavours[flavour], key="model_flavour", revision=model.revision)


def _swapped_or_own(
    name: str,
    base: ModelSource,
    file: ModelSource | None,
    *,
    key: str,
    where: str | None,
    subfolder: str | None,
) -> Component:
    if where is None and file is not None:
        key, where = file.key, file.where
    return swapped_or_own(name, base, key=key, where=where, subfolder=subfolder)


def _text_encoder(name: str, base: ModelSource, file: ModelSource | None) -> Component:
    if file is None:
        return find_component(name, base, kind="transformers")
    return find_in_file(name, file, prefix=TEXT_ENCODER_PREFIXES[name], configuration=base)


def _scheduler(base: ModelSource, file: ModelSource | None) -> Component:
    """The base's scheduler; in a single file, markers without content may say that it is another one."""
    scheduler = find_component("scheduler", base, kind="scheduler")
    if file is None:
        return scheduler
    names, config = names_in(Path(file.where)), dict(scheduler.config)
    if VELOCITY_MARKER in names:
        config["prediction_type"] = "v_prediction"
    if ZERO_SNR_MARKER in names:
        config["rescale_betas_zero_snr"] = True
    return replace(scheduler, config=config)


def _check_classes(parts: SDXLParts) -> None:
    expected = {
        "UNet2DConditionModel": parts.unet,
        "AutoencoderKL": parts.vae,
        "CLIPTextModel": parts.text_encoder,
        "CLIPTextModelWithProjection": parts.text_encoder_2,
    }
    for class_name, component in expected.items():
        if (found := class_of(component.config)) != class_name:
            raise ModelError(
                f"{component.source}: component {component.name} in {component.folder} is {found}, and SDXL "
                f"needs {class_name}. Give an SDXL model, or set model_family to this model's family."
            )
    steps, needed = _number(parts.scheduler, "num_train_timesteps"), SPEC.num_train_timesteps
    if steps != needed:
        raise ModelError(
            f"{parts.scheduler.folder}: num_train_timesteps is {steps}, and SDXL has {needed}. "
            "Give an SDXL model."
        )


def _check_fit(parts: SDXLParts) -> None:
    """Refuse parts whose widths disagree, such as the refiner's or an inpainting UNet."""
    unet = parts.unet.config
    if unet.get("addition_embed_type") != "text_time":
        raise ModelError(
            f"{parts.unet.source}: {parts.unet.folder} is a UNet without SDXL's size and text conditioning "
            f"(addition_embed_type {unet.get('addition_embed_type')!r}, not 'text_time'). Give an SDXL model."
        )
    text_width = _number(parts.text_encoder, "hidden_size") + _number(parts.text_encoder_2, "hidden_size")
    added_width = 6 * _number(parts.unet, "addition_time_embed_dim") + _number(
        parts.text_encoder_2, "projection_dim"
    )
    checks = (
        ("in_channels", _number(parts.vae, "latent_channels"), "latent channels of the VAE"),
        ("cross_attention_dim", text_width, "width of both text encoders"),
        (
            "projection_class_embeddings_input_dim",
            added_width,
            "width of six size values and the pooled text",
        ),
    )
    for name, needed, what in checks:
        if (found := _number(parts.unet, name)) != needed:
            raise ModelError(
                f"{parts.unet.source}: the UNet's {name} is {found}, and the {what} is {needed}. Refiners "
                "and inpainting UNets cannot be trained; give the parts of one SDXL base model."
            )


def _number(component: Component, name: str) -> int:
    value = component.config.get(name)
    if not isinstance(value, int):
        raise ModelError(
            f"{component.source}: {component.folder} has no number for {name} (found {value!r}). "
            "Give a complete SDXL model."
        )
    return value
