"""The adapter of config.json: PEFT's LoRA, or the lycoris json."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from simpletuner.helpers.configuration.schema.base import (
    Count,
    Names,
    OptionalInputFile,
    OptionalText,
    PositiveNumber,
    Section,
    ShareBelowOne,
    contradiction,
)

CHANGE_THE_BASE = ("olora", "pissa")
"""Values of lora_init_type: the adapter fits the base only after subtracting its start from it."""


class AdapterConfig(Section):
    """The adapter; the keys from lora_rank to peft_lora_target_modules are for lora_type standard."""

    lora_type: Literal["standard", "lycoris"] = "standard"
    """standard: LoRA by PEFT; lycoris: T-LoRA or another algorithm, by lycoris_config."""
    lora_rank: Count = 16
    """Rank of the LoRA."""
    lora_alpha: PositiveNumber = Field(default_factory=lambda values: float(values.get("lora_rank", 16)))
    """Scale of the LoRA, applied as lora_alpha / lora_rank. Default: lora_rank, a scale of 1."""
    lora_dropout: ShareBelowOne = 0.0
    """Fraction of inputs dropped in training."""
    lora_init_type: Literal["default", "gaussian", "olora", "pissa"] = "default"
    """Initialisation of the LoRA. olora and pissa start from the base weights; the file then has twice the
    rank, so that it fits the published base model."""
    use_dora: bool = False
    """Train direction and magnitude apart (DoRA)."""
    peft_lora_target_modules: Names | None = None
    """Names of the target layers, a list or comma-separated. Default: the family's."""
    flux_lora_target: OptionalText = None
    """Name of a set of target layers, instead of peft_lora_target_modules."""
    lycoris_config: OptionalInputFile = None
    """The lycoris json: its path, or the object itself. Required by lora_type lycoris."""
    lora_format: Literal["diffusers", "comfyui"] = "diffusers"
    """comfyui also writes a LoRA with all ranks active, with the key names of ComfyUI and kohya's tools."""
    init_lora: OptionalInputFile = None
    """Adapter file to start from, of the same algorithm and rank."""

    @model_validator(mode="after")
    def _has_one_start(self) -> Self:
        if self.lora_type == "standard" and self.lora_init_type in CHANGE_THE_BASE:
            taken = f"{self.lora_init_type} starts from the base weights"
            if self.init_lora is not None:
                raise contradiction(
                    "lora_init_type", f"{taken}, init_lora from a file. Remove one of them.", "init_lora"
                )
            if self.use_dora:
                raise contradiction(
                    "lora_init_type", f"{taken}, which use_dora rescales. Remove one of them.", "use_dora"
                )
        return self
