"""The sections of config.json about the model: which one, its noise, its number formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ValidationInfo, model_validator

from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.schema.base import (
    Count,
    NonNegativeNumber,
    OneOf,
    OptionalNonNegativeNumber,
    OptionalPositiveNumber,
    OptionalText,
    PositiveNumber,
    Section,
    contradiction,
    path_context,
)
from simpletuner.helpers.contracts import PredictionType

FILE_SUFFIX = ".safetensors"
Precision = Annotated[str, OneOf(PRECISIONS)]


def _model_source(value: object, info: ValidationInfo) -> object:
    """A folder or file as its absolute path, a repository's name as it is."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be the folder or the repository of a model, as a text.")
    text = path_context(info).expand(str(value))
    if text.lower().endswith((".ckpt", ".pt", ".pth", ".bin", ".gguf")):
        raise ValueError(
            "is neither a folder in diffusers' layout nor a .safetensors file, which are all that is opened: "
            "pickles can run code, and GGUF is for inference. Give the model as one of those."
        )
    path = path_context(info).input_path(text)
    if path is not None and path.is_file() and path.suffix != FILE_SUFFIX:
        raise ValueError("is a file. Give a folder in diffusers' layout, or a .safetensors file.")
    if path is not None:
        return str(path)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(
            "is no folder or file here. Give an existing one, or a repository written owner/name."
        )
    return text


ModelSource = Annotated[str, BeforeValidator(_model_source)]
OptionalModelSource = Annotated[ModelSource | None, BeforeValidator(lambda value: value or None)]


class ModelConfig(Section):
    """The model that is adapted."""

    model_family: str
    """Family of the model."""
    model_flavour: OptionalText = None
    """Variant within the family, which names the repository when no model is given. Default: the family's."""
    model_type: Literal["lora"] = "lora"
    """What is trained: lora, an adapter of the kind that lora_type names."""
    pretrained_model_name_or_path: ModelSource
    """Folder in diffusers' layout, repository written owner/name, or a whole checkpoint in one .safetensors
    file where the family reads one. Default: the flavour's repository."""
    pretrained_config_name_or_path: OptionalModelSource = None
    """Folder or repository that gives such a file its configuration, tokenizers and scheduler. Default: the
    flavour's repository."""
    pretrained_unet_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another UNet than the model's."""
    pretrained_unet_subfolder: OptionalText = None
    """Subfolder of that UNet; null finds it."""
    pretrained_transformer_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another transformer than the model's."""
    pretrained_transformer_subfolder: OptionalText = None
    """Subfolder of that transformer; null finds it."""
    pretrained_t5_model_name_or_path: OptionalModelSource = None
    """Folder or repository of another T5 text encoder than the model's."""
    pretrained_vae_model_name_or_path: OptionalModelSource = None
    """Folder, repository or .safetensors file of another VAE than the model's."""
    pretrained_vae_subfolder: OptionalText = None
    """Subfolder of that VAE; null finds it."""
    revision: OptionalText = None
    """Branch, tag or commit of the repository; null is its main branch."""
    variant: OptionalText = None
    """Variant of the weight files, for instance fp16; null is the plain one."""
    prediction_type: PredictionType | None = None
    """What the denoiser predicts. Default: what the model's own scheduler says."""
    rescale_betas_zero_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise."""

    @model_validator(mode="after")
    def _configures_a_file(self) -> Self:
        key = "pretrained_config_name_or_path"
        if self.pretrained_config_name_or_path is None:
            return self
        if not self.pretrained_model_name_or_path.endswith(FILE_SUFFIX):
            text = "has an effect only where pretrained_model_name_or_path is a single file. Remove it."
            raise contradiction(key, text, "pretrained_model_name_or_path")
        if self.pretrained_config_name_or_path.endswith(FILE_SUFFIX):
            raise contradiction(key, "is a file. Give a folder in diffusers' layout, or a repository.")
        return self


class NoiseConfig(Section):
    """Which noise levels are trained, how the loss weighs them, and what the model is told beside them."""

    snr_gamma: OptionalPositiveNumber = None
    """Gamma of min-SNR loss weights, usually 5; null or 0 weighs all timesteps alike."""
    flow_sigmoid_scale: PositiveNumber = 1.0
    """Noise levels are the sigmoid of a normal number times this; larger is wider. Flow matching only, as
    the other keys that begin with flow."""
    flow_use_uniform_schedule: bool = False
    """Draw noise levels uniformly instead."""
    flow_use_beta_schedule: bool = False
    """Draw noise levels from a beta distribution instead."""
    flow_beta_schedule_alpha: PositiveNumber = 2.0
    """First parameter of that beta distribution; above the second it prefers high noise."""
    flow_beta_schedule_beta: PositiveNumber = 2.0
    """Second parameter of that beta distribution."""
    flow_schedule_shift: OptionalNonNegativeNumber = None
    """Shift of the noise levels that are drawn and of those that pictures are made at; above 1 is more noise,
    0 and 1 do not shift. null takes what the model's own scheduler says."""
    flow_schedule_auto_shift: bool = False
    """Shift by the number of image tokens, whatever the model's own scheduler says."""
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """What guidance a model with a guidance embedding is told in training: constant, flux_guidance_value;
    random-range, uniform between flux_guidance_min and flux_guidance_max."""
    flux_guidance_value: NonNegativeNumber = 1.0
    """That guidance with constant."""
    flux_guidance_min: NonNegativeNumber = 0.0
    """Lowest guidance with random-range."""
    flux_guidance_max: NonNegativeNumber = 4.0
    """Highest guidance with random-range."""
    flux_attention_masked_training: bool = False
    """Attention passes over the padding of captions, in training and in pictures made while training."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.flow_use_uniform_schedule and self.flow_use_beta_schedule:
            raise contradiction(
                "flow_use_beta_schedule",
                "noise levels are drawn one way only. Leave out this or flow_use_uniform_schedule.",
                "flow_use_uniform_schedule",
            )
        if self.flow_schedule_auto_shift and self.flow_schedule_shift is not None:
            raise contradiction(
                "flow_schedule_shift",
                f"{self.flow_schedule_shift:g} has no effect with flow_schedule_auto_shift. Leave out one.",
                "flow_schedule_auto_shift",
            )
        low, high = self.flux_guidance_min, self.flux_guidance_max
        if low > high:
            raise contradiction(
                "flux_guidance_min",
                f"{low:g} is above flux_guidance_max {high:g}. Lower it.",
                "flux_guidance_max",
            )
        return self


class PrecisionConfig(Section):
    """Number formats and memory."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Format of the frozen model and of the computation; no is float32. The adapter itself is float32."""
    base_model_precision: Precision = UNCHANGED
    """Format of the frozen denoiser's linear layers; fewer bits are a little less exact."""
    text_encoder_1_precision: Precision = UNCHANGED
    """The same for the first text encoder; its prompt embeds are cached apart."""
    text_encoder_2_precision: Precision = UNCHANGED
    """The same for the second."""
    text_encoder_3_precision: Precision = UNCHANGED
    """The same for the third."""
    text_encoder_4_precision: Precision = UNCHANGED
    """The same for the fourth."""
    enable_group_offload: bool = False
    """Keep the denoiser's blocks on the host and bring them to the device a group at a time, forwards and
    backwards: much less memory, much slower."""
    group_offload_type: Literal["block_level", "leaf_level"] = "block_level"
    """What a group is: block_level, neighbouring blocks; leaf_level, a single layer."""
    group_offload_blocks_per_group: Count = 1
    """Blocks that are brought together with block_level."""
    vae_batch_size: Count = 1
    """Images encoded at a time; above 1, last bits depend on it as with text_encoder_batch_size."""
    vae_enable_tiling: bool = False
    """Encode and decode in tiles: less memory, slightly different values."""
    vae_enable_slicing: bool = False
    """Decode the images of a batch one by one: less memory."""
