"""Rules of model_type full, which trains the weights of the denoiser and no adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.loading.layers import RawValue
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.base import Section
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig, slider_strengths
from simpletuner.helpers.configuration.schema.sections import ValidationPrompt
from simpletuner.helpers.configuration.schema.whole_model import WholeModelConfig

_ONLY: Mapping[str, tuple[object, str]] = MappingProxyType(
    {
        "mixed_precision": (
            ("bf16", "no"),
            "its numbers have no room for the small updates of whole weights. Use {allowed}.",
        ),
        "base_model_precision": ((UNCHANGED,), "quantised weights are not trained. Use {allowed}."),
        "enable_group_offload": ((False,), "offloaded weights are not trained. Use {allowed}."),
        "train_text_encoder": (
            (False,),
            "the text encoders' LoRA has no adapter to stand beside. Use {allowed}.",
        ),
        "placeholder_token": (
            (None,),
            "the text encoders learn no new token. Remove it, or set model_type to lora or embedding.",
        ),
        "push_to_hub": (
            (False,),
            "whole models are not uploaded. Use {allowed}, and upload the folder yourself.",
        ),
        "validation_compared_config": ((None,), "there is no adapter to compare. Remove it."),
        "validation_lycoris_strength": ((1.0,), "there is no adapter that has a strength. Remove it."),
    }
)
"""Key -> the values that model_type full takes, and why."""


def check_whole_model(
    sections: Sequence[Section],
    raw: Mapping[str, RawValue],
    *,
    prompts: Sequence[ValidationPrompt],
    datasets: Sequence[DatasetConfig],
    source: Source,
) -> None:
    """Check that every key fits model_type full, or that no key of it is set without."""
    values = {key: value for section in sections for key, value in section}
    if values.get("model_type") != "full":
        for key, field in WholeModelConfig.model_fields.items():
            if values.get(key, field.default) != field.default:
                source.add(key, "has an effect with model_type full only. Remove it.")
        return
    problems = chain(
        adapter_problems(values, raw),
        _value_problems(values),
        _data_problems(values, datasets=datasets, prompts=prompts),
        _backward_problems(values),
    )
    for key, text in problems:
        source.add(key, text)


def adapter_problems(values: Mapping[str, object], raw: Mapping[str, RawValue]) -> Iterator[tuple[str, str]]:
    """(key, problem) of each key of adapters that is set for a model_type without one."""
    for key, field in AdapterConfig.model_fields.items():
        if key not in raw or key not in values:
            continue
        default = field.get_default(call_default_factory=True, validated_data=dict(values))
        if values[key] != default:
            yield key, f"is a key of adapters, and model_type {values['model_type']} trains none. Remove it."


def _value_problems(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, (allowed, text) in _ONLY.items():
        assert isinstance(allowed, tuple)
        if key in values and values[key] not in allowed:
            names = " or ".join(str(each).lower() for each in allowed)
            yield key, f"{values[key]}: with model_type full, {text.format(allowed=names)}"


def _data_problems(
    values: Mapping[str, object], *, datasets: Sequence[DatasetConfig], prompts: Sequence[ValidationPrompt]
) -> Iterator[tuple[str, str]]:
    has_regularisation = any(each.is_regularisation_data for each in datasets)
    if has_regularisation and values.get("regularisation_target") == "base":
        yield (
            "regularisation_target",
            "base: model_type full changes the base model, whose prediction this target is. Use data.",
        )
    yield from slider_problems(values, datasets)
    if any(prompt.strength not in (None, 1.0) for prompt in prompts):
        yield "user_prompt_library", "adapter_strength has no meaning with model_type full. Remove it."


def slider_problems(
    values: Mapping[str, object], datasets: Sequence[DatasetConfig]
) -> Iterator[tuple[str, str]]:
    """(key, problem) of datasets of a slider for a model_type without an adapter."""
    if slider_strengths(datasets):
        text = (
            f"slider_strength is for adapters, and model_type {values['model_type']} trains none. Remove it."
        )
        yield "data_backend_config", text


def _backward_problems(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if not values.get("fused_backward_pass"):
        return
    key = "fused_backward_pass"
    if values.get("gradient_accumulation_steps", 1) != 1:
        yield key, "true: needs gradient_accumulation_steps 1, since no gradient is kept."
    if values.get("max_grad_norm") and values.get("grad_clip_method") == "norm":
        yield (
            key,
            "true: max_grad_norm needs the norm of all gradients, which are never there together. Set "
            "max_grad_norm to 0, or grad_clip_method to value.",
        )
    optimizer = str(values.get("optimizer", "adamw"))
    if OPTIMIZERS[optimizer].needs_all_gradients:
        others = ", ".join(name for name, each in OPTIMIZERS.items() if not each.needs_all_gradients)
        yield key, f"true: the step of {optimizer} needs all gradients together. Use one of {others}."
