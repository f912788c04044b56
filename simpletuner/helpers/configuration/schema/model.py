"""The base model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from simpletuner.helpers.configuration.schema.base import OptionalText, Section, contradiction
from simpletuner.helpers.configuration.schema.model_source import (
    FILE_SUFFIX,
    ModelSource,
    OptionalModelSource,
)
from simpletuner.helpers.contracts import PredictionType

WITHOUT_ADAPTER = ("full", "embedding")
"""Values of model_type that train no adapter of the denoiser."""


def _token_length(value: object) -> int:
    length = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if length not in (75, 150, 225) or not isinstance(length, int):
        raise ValueError("must be one of 75, 150, 225.")
    return length


class ModelConfig(Section):
    """The base model."""

    model_family: str
    """Family of the model."""
    model_flavour: OptionalText = None
    """Variant within the family; it names the repository if no model is given. Default: the family's."""
    model_type: Literal["lora", "full", "embedding"] = "lora"
    """lora trains an adapter, by lora_type; full trains the weights of the denoiser; embedding trains the new
    token of placeholder_token and nothing else."""
    pretrained_model_name_or_path: ModelSource
    """Folder in diffusers' layout, repository written owner/name, or checkpoint in one .safetensors file if
    the family reads one. Default: the flavour's repository."""
    pretrained_config_name_or_path: OptionalModelSource = None
    """Folder or repository with the configuration, tokenizers and scheduler for such a file. Default: the
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
    """Variant of the weight files, for instance fp16; null for files without a variant."""
    prediction_type: PredictionType | None = None
    """Prediction type of the denoiser. Default: that of the model's own scheduler."""
    rescale_betas_zero_snr: bool = False
    """Rescale the noise schedule so that the last timestep is pure noise."""
    max_token_length: Annotated[Literal[75, 150, 225], BeforeValidator(_token_length)] = 75
    """Tokens of a prompt that are read, in training, validation and images from the adapter: each 75 are a
    chunk, and all prompts have equally many."""

    @property
    def is_full(self) -> bool:
        """Whether the run trains the weights of the denoiser instead of an adapter."""
        return self.model_type == "full"

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter of the denoiser is trained."""
        return self.model_type not in WITHOUT_ADAPTER

    @model_validator(mode="after")
    def _configures_a_file(self) -> Self:
        key = "pretrained_config_name_or_path"
        if self.pretrained_config_name_or_path is None:
            return self
        if not self.pretrained_model_name_or_path.endswith(FILE_SUFFIX):
            text = "has an effect only if pretrained_model_name_or_path is a single file. Remove it."
            raise contradiction(key, text, "pretrained_model_name_or_path")
        if self.pretrained_config_name_or_path.endswith(FILE_SUFFIX):
            raise contradiction(key, "is a file. Give a folder in diffusers' layout, or a repository.")
        return self
