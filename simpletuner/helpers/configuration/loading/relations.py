"""Conditions between keys under which a key of SimpleTuner has no effect; translation.json names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from simpletuner.helpers.choices.captions import CAPTION_SOURCES
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.contracts import ModelSpec

_FIXED_CROPS = ("center", "centre", "corner")
_DECAYING = ("polynomial", "cosine", "cosine_with_restarts", "sine")
"""Schedules of SimpleTuner that end at lr_end."""


@dataclass(frozen=True)
class Context:
    """What a relation may look at."""

    values: Mapping[str, object]
    """Every key of the file, or of the entry of a dataset json, and of what it inherits."""
    spec: ModelSpec | None = None
    """The model family; None if it is unknown."""
    foreign: frozenset[str] = field(default_factory=frozenset)
    """Keys that only other families read."""

    def text(self, key: str) -> str:
        """The value as a text in lower case; empty for none."""
        value = self.values.get(key)
        return "" if value is None else str(value).strip().lower()

    def number(self, key: str) -> float | None:
        """The value as a number; None for anything else."""
        try:
            return float(self.text(key))
        except ValueError:
            return None

    def is_on(self, key: str) -> bool:
        """Whether the value switches something on."""
        return not is_off(self.values.get(key))


def _has_no_random_crop(key: str, context: Context) -> bool:
    is_fixed = context.text("crop_style") in _FIXED_CROPS and context.text("crop_aspect") != "random"
    return context.is_on(key) and (not context.is_on("crop") or is_fixed)


def _is_unquantised(_key: str, context: Context) -> bool:
    return context.text("base_model_precision") in ("", UNCHANGED)


def _has_no_real_guidance(_key: str, context: Context) -> bool:
    return (context.number("validation_guidance_real") or 0.0) <= 1


def _is_not_prodigy(_key: str, context: Context) -> bool:
    return context.text("optimizer") != "prodigy"


def _is_squared_loss(_key: str, context: Context) -> bool:
    return context.text("loss_type") == "l2" or not context.is_on("loss_type")


def _is_not_singlora(_key: str, context: Context) -> bool:
    return context.text("peft_lora_mode") != "singlora"


def _is_foreign(key: str, context: Context) -> bool:
    return key in context.foreign


def _is_unet(key: str, context: Context) -> bool:
    return _is_foreign(key, context) and context.spec is not None and context.spec.denoiser_name == "unet"


def _has_fixed_shift(key: str, context: Context) -> bool:
    is_read = context.spec is not None and key in context.spec.own_keys
    return is_read and not context.is_on("flow_schedule_auto_shift")


def _decays(_key: str, context: Context) -> bool:
    return context.text("lr_scheduler") in _DECAYING


def _is_polynomial(_key: str, context: Context) -> bool:
    return context.text("lr_scheduler") == "polynomial"


def _is_standard(_key: str, context: Context) -> bool:
    return context.text("lora_type") in ("", "standard")


def _is_given_as_standard(_key: str, context: Context) -> bool:
    return context.text("lora_type") == "standard"


def _has_other_captions(_key: str, context: Context) -> bool:
    record = CAPTION_SOURCES.named(context.values.get("caption_strategy"))
    has_prompt = context.is_on("only_instance_prompt")
    return has_prompt or (record is not None and record.name != "table")


def _names_no_model(_key: str, context: Context) -> bool:
    return not context.is_on("pretrained_model_name_or_path")


def _has_prompts(_key: str, context: Context) -> bool:
    prompts = ("validation_prompt", "validation_prompt_library", "user_prompt_library")
    return not context.is_on("validation_disable") and any(map(context.is_on, prompts))


def _lacks_caption_strategy(_key: str, context: Context) -> bool:
    entries = context.values.get("data_backend_config")
    return not isinstance(entries, list) or any(
        isinstance(entry, Mapping)
        and entry.get("caption_strategy") is None
        and entry.get("dataset_type", "image") == "image"
        and is_off(entry.get("disabled"))
        for entry in entries
    )


RELATIONS: Mapping[str, Callable[[str, Context], bool]] = MappingProxyType(
    {
        "no random crop": _has_no_random_crop,
        "base_model_precision no_change": _is_unquantised,
        "validation_guidance_real of 1 or less": _has_no_real_guidance,
        "another optimizer": _is_not_prodigy,
        "loss_type l2": _is_squared_loss,
        "another peft_lora_mode": _is_not_singlora,
        "another kind of model": _is_foreign,
        "on a UNet": _is_unet,
        "flow matching without flow_schedule_auto_shift": _has_fixed_shift,
        "a schedule that decays to lr_end": _decays,
        "lr_scheduler polynomial": _is_polynomial,
        "lora_type standard": _is_standard,
        "lora_type given as standard": _is_given_as_standard,
        "captions from elsewhere": _has_other_captions,
        "without a model or its flavour": _names_no_model,
        "with validation images": _has_prompts,
        "a dataset without caption_strategy": _lacks_caption_strategy,
    }
)
