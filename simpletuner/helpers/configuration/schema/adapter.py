"""The adapter of config.json: PEFT's LoRA, or the lycoris json."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from simpletuner.helpers.configuration.schema.base import (
    Count,
    OptionalInputFile,
    OptionalText,
    PositiveNumber,
    Section,
    ShareBelowOne,
    contradiction,
    path_context,
)

CHANGE_THE_BASE = ("olora", "pissa")
"""Values of lora_init_type: the adapter fits the base only after subtracting its start from it."""
_NAMES = re.compile(r"[\w\s,.-]*")
"""Text without any sign of a regular expression but the dot, which stands in paths of layers."""


def _targets(value: object, info: ValidationInfo) -> object:
    """Names, also from json in a text or a file, or the text of a regular expression.

    Raises:
        ValueError: The file or the expression cannot be read.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower().endswith(".json"):
        return _list_in(_read(text, info), f"{text} must hold an array of names.")
    if text.startswith("[") and text.endswith("]"):
        with suppress(json.JSONDecodeError):  # a regular expression may begin and end with a set
            return _list_in(json.loads(text), "must be an array of names.")
    if _NAMES.fullmatch(text):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        re.compile(text)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + 1}"
        raise ValueError(
            f"is no regular expression: {error.msg}{place}. Correct it, or give a list of names."
        ) from error
    return text


def _read(text: str, info: ValidationInfo) -> object:
    path = path_context(info).input_path(text)
    if path is None:
        raise ValueError(f"{text} is not found. Correct the path, or give the names themselves.")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} holds no json: {error}. Correct the file.") from error


def _list_in(value: object, problem: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(problem)
    return tuple(each.strip() for each in value if each.strip())


TargetLayers = Annotated[tuple[str, ...] | str, BeforeValidator(_targets)]


class AdapterConfig(Section):
    """The adapter; the keys from lora_rank to slider_lora_target are for lora_type standard."""

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
    use_rslora: bool = False
    """Scale the LoRA by lora_alpha / sqrt(lora_rank) (rsLoRA). Its files hold the scale in the factors, for
    every program."""
    peft_lora_target_modules: TargetLayers | None = None
    """Target layers: names, each the end of a path, as a list, comma-separated or in a .json file; or a
    regular expression that matches whole paths. Default: the family's."""
    slider_lora_target: bool = False
    """Adapt the family's layers for sliders, which leave text alone, instead of peft_lora_target_modules."""
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
