"""Rules that hold between keys of different sections, and between them and the model family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simpletuner.helpers.choices.algorithms import ALGORITHMS, STANDARD
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED, Precision
from simpletuner.helpers.choices.samplers import samplers_of
from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.loading.layers import RawValue
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import (
    CHANGE_THE_BASE,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.contracts import ModelSpec, Size

_PIXELS_PER_MEGAPIXEL = 1_000_000
_NO_PLAIN_FORM = ("use_tucker", "weight_decompose", "train_norm")
"""Arguments with which an algorithm trains more than the two factors of a LoRA."""


def family_of(
    given: Mapping[str, RawValue], families: Mapping[str, ModelSpec], place: Source
) -> ModelSpec | None:
    """The facts of the family that the user named, or None with the problem noted."""
    known = ", ".join(sorted(families))
    if "model_family" not in given:
        place.add("model_family", f"required, but missing. Known families: {known}.")
        return None
    name = given["model_family"].value
    if not isinstance(name, str) or name not in families:
        hint = nearest(name, families) if isinstance(name, str) else ""
        place.add(
            "model_family",
            f"{place.problems.shown(name)}: not a model family here. Known families: {known}.{hint}",
        )
        return None
    return families[name]


def family_defaults(given: Mapping[str, RawValue], spec: ModelSpec) -> dict[str, object]:
    """What the family gives to keys that the user left out."""
    defaults: dict[str, object] = {
        "aspect_bucket_alignment": spec.pixel_alignment,
        "peft_lora_target_modules": _preset_targets(given, spec) or spec.lora_targets,
        "validation_guidance": spec.default_guidance,
    }
    in_area = "resolution_type" in given and given["resolution_type"].value == "area"
    edge = spec.default_resolution
    defaults["resolution"] = round(edge**2 / _PIXELS_PER_MEGAPIXEL, 3) if in_area else float(edge)
    flavour = given["model_flavour"].value if "model_flavour" in given else spec.default_flavour
    if "pretrained_model_name_or_path" not in given:
        defaults["model_flavour"] = spec.default_flavour
        defaults["pretrained_model_name_or_path"] = spec.flavours.get(
            str(flavour), spec.flavours[spec.default_flavour]
        )
    return {key: value for key, value in defaults.items() if key not in given}


def check_model(model: ModelConfig, spec: ModelSpec, place: Source) -> None:
    """Flavour and prediction type are the family's."""
    if model.model_flavour is not None and model.model_flavour not in spec.flavours:
        found, hint = place.problems.shown(model.model_flavour), nearest(model.model_flavour, spec.flavours)
        place.add("model_flavour", f"{found}: must be one of {', '.join(spec.flavours)}.{hint}")
    if model.prediction_type not in (None, *spec.prediction_types):
        allowed = ", ".join(spec.prediction_types)
        place.add(
            "prediction_type",
            f"{place.problems.shown(model.prediction_type)}: {spec.name} predicts {allowed}.",
        )


def check_family(
    sections: Sequence[Validated[Any]], spec: ModelSpec, *, families: Mapping[str, ModelSpec], place: Source
) -> None:
    """Keys that are about other kinds of models are not set, and the family agrees with the others."""
    foreign = frozenset().union(*(each.own_keys for each in families.values())) - spec.own_keys
    values: dict[str, object] = {}
    for built in sections:
        if built.section is None:
            continue
        defaults = {key: field.default for key, field in type(built.section).model_fields.items()}
        values |= {key: value for key, value in built.section if key not in built.wrong}
        for key in sorted(foreign & defaults.keys() - built.wrong):
            if values[key] != defaults[key]:
                place.add(key, f"means nothing to model_family {spec.name}. Remove it.")
    for key, problem in (spec.problems(values) if spec.problems is not None else {}).items():
        place.add(key, problem)


def check_lora_preset(
    given: Mapping[str, RawValue], adapter: Validated[AdapterConfig], *, spec: ModelSpec, place: Source
) -> None:
    """The set of layers that the user named is one of the family's, and the only choice of layers."""
    key = spec.lora_preset_key
    if key is None or key not in given or given[key].value is None:
        return
    found = given[key].value
    if found not in spec.lora_presets:
        hint = nearest(str(found), spec.lora_presets)
        known = ", ".join(spec.lora_presets)
        place.add(key, f"{place.problems.shown(found)}: must be one of {known}.{hint}")
    elif adapter.section is not None:
        modules = adapter.section.peft_lora_target_modules
        if modules is not None and set(modules) != set(spec.lora_presets[str(found)]):
            place.add(key, "names other layers than peft_lora_target_modules. Leave out one.")


def _preset_targets(given: Mapping[str, RawValue], spec: ModelSpec) -> tuple[str, ...] | None:
    key = spec.lora_preset_key
    return spec.lora_presets.get(str(given[key].value)) if key is not None and key in given else None


def check_format(
    adapter: Validated[AdapterConfig], lycoris: LycorisConfig | None, *, spec: ModelSpec, place: Source
) -> None:
    """What is trained can be written as a plain LoRA, where one is asked for."""
    section = adapter.right("lora_format", "lora_type", "use_dora", "lora_init_type")
    if section is None or section.lora_format == "diffusers":
        return
    reasons = []
    if spec.original_name is None:
        reasons.append(f"{spec.name} has no such names here")
    if section.lora_type == STANDARD.name:
        if section.use_dora:
            reasons.append("use_dora trains more than a plain LoRA holds")
    elif lycoris is not None:
        entries = lycoris.apply_preset.entries
        algorithms = {lycoris.algo, *(entry.algo for entry in entries if entry.algo is not None)}
        others = sorted(name for name in algorithms if not ALGORITHMS[name].is_plain_lora)
        reasons += [f"algo {name} is no plain LoRA" for name in others]
        for name in _NO_PLAIN_FORM:
            if lycoris.extra.get(name) or any(dict(entry)[name] for entry in entries):
                reasons.append(f"{name} trains more than a plain LoRA holds")
    if reasons:
        place.add("lora_format", f"comfyui: {'; '.join(reasons)}. Change that, or set it to diffusers.")


def check_precision(
    precision: Validated[PrecisionConfig],
    adapter: Validated[AdapterConfig],
    lycoris: LycorisConfig | None,
    *,
    spec: ModelSpec,
    place: Source,
) -> None:
    """The text encoders that are quantised exist, and the adapter can be trained on a quantised denoiser."""
    for number in range(spec.num_text_encoders + 1, 5):
        key = f"text_encoder_{number}_precision"
        section = precision.right(key)
        if section is not None and dict(section)[key] != UNCHANGED:
            count = spec.num_text_encoders
            has = f"{spec.name} has {count} text encoder{'s' if count > 1 else ''}"
            place.add(key, f"{place.problems.shown(dict(section)[key])}: {has}. Remove it.")
    section, trained = precision.right("base_model_precision"), adapter.right("lora_type", "lora_init_type")
    if section is None or trained is None or section.base_model_precision == UNCHANGED:
        return
    wanted = section.base_model_precision
    if trained.lora_type == STANDARD.name:
        if trained.lora_init_type in CHANGE_THE_BASE:
            found = f"{trained.lora_init_type}: changes the base weights, which base_model_precision {wanted}"
            place.add("lora_init_type", f"{found} has rounded. Use default or gaussian.")
    elif lycoris is not None:
        for reason in dict.fromkeys(_unquantisable(lycoris, PRECISIONS[wanted])):
            place.add("base_model_precision", f"{wanted}: {reason}, or set it to {UNCHANGED}.")


def _unquantisable(lycoris: LycorisConfig, precision: Precision) -> Iterator[str]:
    """Reasons why layers of a LyCORIS adapter cannot be trained on quantised weights."""
    network = {"algo": lycoris.algo, **lycoris.extra}
    for entry in ({}, *map(dict, lycoris.apply_preset.entries)):
        layer = network | {key: value for key, value in entry.items() if value is not None}
        algorithm = ALGORITHMS[str(layer["algo"])]
        if not algorithm.adds_to_weight:
            continue
        if algorithm.needs_dense_weight:
            others = ", ".join(name for name, each in ALGORITHMS.items() if not each.needs_dense_weight)
            yield f"algo {algorithm.name} needs the dense weight. Use one of {others}"
        elif layer.get("weight_decompose"):
            yield f"algo {algorithm.name} with weight_decompose needs the dense weight. Remove that"
        elif precision.needs_bypass_mode and not layer.get("bypass_mode"):
            yield f"algo {algorithm.name} adds to the weight. Set bypass_mode to true in the lycoris json"


def check_offload(
    precision: Validated[PrecisionConfig],
    training: Validated[TrainingConfig],
    validation: Validated[ValidationConfig],
    *,
    spec: ModelSpec,
    place: Source,
) -> None:
    """A denoiser whose blocks stay on the host can be trained as the rest of the configuration says."""
    section = precision.right("enable_group_offload", "group_offload_type", "base_model_precision")
    if section is None or not section.enable_group_offload:
        return
    if section.group_offload_type == "block_level" and spec.denoiser_name == "unet":
        text = "block_level: a UNet's blocks are run again in parts. Use leaf_level."
        place.add("group_offload_type", text)
    record = PRECISIONS[section.base_model_precision]
    if not record.works_with_group_offload:
        others = ", ".join(name for name, each in PRECISIONS.items() if each.works_with_group_offload)
        text = f"true: {record.name} layers stay on the device. Use one of {others}, or set it to false."
        place.add("enable_group_offload", text)
    trained, shown = training.right("gradient_checkpointing"), validation.right("validation_compared_config")
    if trained is not None and not trained.gradient_checkpointing:
        text = "true: without gradient_checkpointing every group stays on the device. Set that to true."
        place.add("enable_group_offload", text)
    if shown is not None and shown.validation_compared_config is not None:
        text = "cannot be shown with enable_group_offload. Leave out one of them."
        place.add("validation_compared_config", text)


def check_alignment(data: Validated[DataConfig], spec: ModelSpec, place: Source) -> None:
    """Buckets have sizes that VAE and denoiser can take, and images fit into them."""
    section = data.right("aspect_bucket_alignment")
    if section is None or section.aspect_bucket_alignment is None:
        return
    alignment = section.aspect_bucket_alignment
    if alignment % spec.minimum_alignment:
        place.add(
            "aspect_bucket_alignment",
            f"{alignment}: must be a multiple of {spec.minimum_alignment}. Use {spec.pixel_alignment}.",
        )
        return
    edge = training_edge_px(section)
    if data.right("resolution", "resolution_type") is not None and edge < alignment:
        place.add(
            "resolution",
            f"{section.resolution:g} is {edge:.0f} px, below aspect_bucket_alignment {alignment}. Raise it.",
        )


def check_pictures(validation: Validated[ValidationConfig], spec: ModelSpec, place: Source) -> None:
    """Validation sizes are multiples of what the family needs."""
    sampler = validation.right("validation_noise_scheduler")
    name = sampler.validation_noise_scheduler if sampler is not None else None
    samplers = samplers_of(spec)
    if name is not None and name not in samplers:
        known = ", ".join(samplers)
        place.add(
            "validation_noise_scheduler",
            f"{place.problems.shown(name)}: model_family {spec.name} is sampled with {known}. "
            "Name one of them, or null for the model's own.",
        )
    section = validation.right("validation_resolution")
    step = spec.minimum_alignment
    for size in section.validation_resolution if section is not None else ():
        if size.width % step or size.height % step:
            near = Size(height=_nearest(size.height, step), width=_nearest(size.width, step))
            place.add(
                "validation_resolution", f"{size}: width and height must be multiples of {step}. Use {near}."
            )


def check_output(checkpoint: Validated[CheckpointConfig], folders: Mapping[str, str], place: Source) -> None:
    """The run writes nothing into a dataset.

    Args:
        checkpoint: Holds output_dir.
        folders: Dataset id -> its folder.
        place: Where output_dir was given.
    """
    section = checkpoint.right("output_dir")
    if section is None:
        return
    for name, folder in folders.items():
        if section.output_dir.is_relative_to(folder):
            found = place.problems.shown(str(section.output_dir))
            place.add(
                "output_dir", f"{found}: lies inside instance_data_dir of dataset {name}. Choose another."
            )


def check_comparison(run: RunConfig, place: Source) -> None:
    """The run that this one is compared with adapts the same model, and writes somewhere else."""
    other = run.compared_with
    if other is None:
        return
    key, theirs = "validation_compared_config", dict(other.model)
    for each, value in run.model:
        if theirs[each] != value and each != "model_flavour":  # which only names the default repository
            found, here = place.problems.shown(theirs[each]), place.problems.shown(value)
            place.add(key, f"that run's {each} is {found}, here it is {here}. Name a run on the same model.")
    if other.checkpoint.output_dir == run.checkpoint.output_dir:
        place.add(key, "that run has the output_dir of this one. Give one of them another.")
    if other.adapter.lora_type == STANDARD.name and other.adapter.lora_init_type in CHANGE_THE_BASE:
        found = other.adapter.lora_init_type
        place.add(key, f"that run's lora_init_type {found} changes the base weights. Name another run.")


def training_edge_px(data: DataConfig) -> float:
    """Edge in pixels of a square image at the training resolution."""
    return (
        math.sqrt(data.resolution * _PIXELS_PER_MEGAPIXEL)
        if data.resolution_type == "area"
        else data.resolution
    )


def training_size(data: DataConfig, spec: ModelSpec) -> Size:
    """The square bucket of the training resolution: the size of validation pictures when none is given."""
    edge = _nearest(training_edge_px(data), data.aspect_bucket_alignment or spec.pixel_alignment)
    return Size(height=edge, width=edge)


def _nearest(edge_px: float, step: int) -> int:
    return max(1, round(edge_px / step)) * step
