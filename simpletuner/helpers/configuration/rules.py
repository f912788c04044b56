"""Rules that hold between keys of different sections, and between them and the model family."""

from __future__ import annotations

import math
from collections.abc import Mapping

from simpletuner.helpers.configuration.building import Built, Place
from simpletuner.helpers.configuration.layers import Given
from simpletuner.helpers.configuration.lycoris import LycorisConfig
from simpletuner.helpers.configuration.problems import nearest
from simpletuner.helpers.configuration.sections import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ValidationConfig,
)
from simpletuner.helpers.contracts import FamilyFacts, Size

_PIXELS_PER_MEGAPIXEL = 1_000_000
_PLAIN_ALGORITHMS = frozenset({"tlora", "lora", "locon"})
_NO_PLAIN_FORM = ("use_tucker", "weight_decompose", "train_norm")
"""Arguments with which even those train more than two factors."""
_CHANGE_THE_BASE = ("olora", "pissa")
"""Of lora_init_type: the adapter fits the base only after subtracting its start from it."""


def family_of(
    given: Mapping[str, Given], families: Mapping[str, FamilyFacts], place: Place
) -> FamilyFacts | None:
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


def family_defaults(given: Mapping[str, Given], facts: FamilyFacts) -> dict[str, object]:
    """What the family gives to keys that the user left out."""
    defaults: dict[str, object] = {
        "aspect_bucket_alignment": facts.pixel_alignment,
        "peft_lora_target_modules": facts.lora_targets,
    }
    in_area = "resolution_type" in given and given["resolution_type"].value == "area"
    edge = facts.default_resolution
    defaults["resolution"] = round(edge**2 / _PIXELS_PER_MEGAPIXEL, 3) if in_area else float(edge)
    flavour = given["model_flavour"].value if "model_flavour" in given else facts.default_flavour
    if "pretrained_model_name_or_path" not in given:
        defaults["model_flavour"] = facts.default_flavour
        defaults["pretrained_model_name_or_path"] = facts.flavours.get(
            str(flavour), facts.flavours[facts.default_flavour]
        )
    return {key: value for key, value in defaults.items() if key not in given}


def check_model(model: ModelConfig, facts: FamilyFacts, place: Place) -> None:
    """Flavour and prediction type are the family's."""
    if model.model_flavour is not None and model.model_flavour not in facts.flavours:
        found, hint = place.problems.shown(model.model_flavour), nearest(model.model_flavour, facts.flavours)
        place.add("model_flavour", f"{found}: must be one of {', '.join(facts.flavours)}.{hint}")
    if model.prediction_type not in (None, *facts.prediction_types):
        allowed = ", ".join(facts.prediction_types)
        place.add(
            "prediction_type",
            f"{place.problems.shown(model.prediction_type)}: {facts.name} predicts {allowed}.",
        )


def check_format(
    adapter: Built[AdapterConfig], lycoris: LycorisConfig | None, *, facts: FamilyFacts, place: Place
) -> None:
    """What is trained can be written as a plain LoRA, where one is asked for."""
    section = adapter.right("lora_format", "lora_type", "use_dora", "lora_init_type")
    if section is None or section.lora_format == "diffusers":
        return
    reasons = []
    if facts.original_name is None:
        reasons.append(f"{facts.name} has no such names here")
    if section.lora_type == "standard":
        if section.use_dora:
            reasons.append("use_dora trains more than a plain LoRA holds")
        if section.lora_init_type in _CHANGE_THE_BASE:
            reasons.append(f"lora_init_type {section.lora_init_type} changes the base weights")
    elif lycoris is not None:
        preset = lycoris.apply_preset
        entries = (*preset.module_algo_map.values(), *preset.name_algo_map.values())
        algorithms = {lycoris.algo, *(entry.algo for entry in entries if entry.algo is not None)}
        reasons += [f"algo {algo} is no plain LoRA" for algo in sorted(algorithms - _PLAIN_ALGORITHMS)]
        for name in _NO_PLAIN_FORM:
            if lycoris.extra.get(name) or any(dict(entry)[name] for entry in entries):
                reasons.append(f"{name} trains more than a plain LoRA holds")
    if reasons:
        place.add("lora_format", f"comfyui: {'; '.join(reasons)}. Change that, or set it to diffusers.")


def check_alignment(data: Built[DataConfig], facts: FamilyFacts, place: Place) -> None:
    """Buckets have sizes that VAE and denoiser can take, and images fit into them."""
    section = data.right("aspect_bucket_alignment")
    if section is None or section.aspect_bucket_alignment is None:
        return
    alignment = section.aspect_bucket_alignment
    if alignment % facts.minimum_alignment:
        place.add(
            "aspect_bucket_alignment",
            f"{alignment}: must be a multiple of {facts.minimum_alignment}. Use {facts.pixel_alignment}.",
        )
        return
    edge = training_edge_px(section)
    if data.right("resolution", "resolution_type") is not None and edge < alignment:
        place.add(
            "resolution",
            f"{section.resolution:g} is {edge:.0f} px, below aspect_bucket_alignment {alignment}. Raise it.",
        )


def check_pictures(validation: Built[ValidationConfig], facts: FamilyFacts, place: Place) -> None:
    """Validation sizes are multiples of what the family needs."""
    section = validation.right("validation_resolution")
    step = facts.minimum_alignment
    for size in section.validation_resolution if section is not None else ():
        if size.width % step or size.height % step:
            near = Size(height=_nearest(size.height, step), width=_nearest(size.width, step))
            place.add(
                "validation_resolution", f"{size}: width and height must be multiples of {step}. Use {near}."
            )


def check_output(checkpoint: Built[CheckpointConfig], folders: Mapping[str, str], place: Place) -> None:
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


def check_comparison(run: RunConfig, place: Place) -> None:
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
    if other.adapter.lora_type == "standard" and other.adapter.lora_init_type in _CHANGE_THE_BASE:
        found = other.adapter.lora_init_type
        place.add(key, f"that run's lora_init_type {found} changes the base weights. Name another run.")


def training_edge_px(data: DataConfig) -> float:
    """Edge in pixels of a square image at the training resolution."""
    return (
        math.sqrt(data.resolution * _PIXELS_PER_MEGAPIXEL)
        if data.resolution_type == "area"
        else data.resolution
    )


def training_size(data: DataConfig, facts: FamilyFacts) -> Size:
    """The square bucket of the training resolution: the size of validation pictures when none is given."""
    edge = _nearest(training_edge_px(data), data.aspect_bucket_alignment or facts.pixel_alignment)
    return Size(height=edge, width=edge)


def _nearest(edge_px: float, step: int) -> int:
    return max(1, round(edge_px / step)) * step
