"""Rules between keys of different sections, and between keys and the model family."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.choices.algorithms import ALGORITHMS, DISPROPORTIONATE, STANDARD
from simpletuner.helpers.choices.losses import LOSSES, Loss
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED, Precision
from simpletuner.helpers.choices.samplers import samplers_of
from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.loading.dataset_file import DatasetFile
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.loading.layers import RawValue
from simpletuner.helpers.configuration.schema.adapter import CHANGE_THE_BASE, AdapterConfig
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig, slider_strengths
from simpletuner.helpers.configuration.schema.ema import EmaConfig
from simpletuner.helpers.configuration.schema.evaluation import EvaluationConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.masks import MaskConfig
from simpletuner.helpers.configuration.schema.model import WITHOUT_ADAPTER, ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig, noise_problems
from simpletuner.helpers.configuration.schema.publishing import PublishingConfig
from simpletuner.helpers.configuration.schema.regularisation import RegularisationConfig
from simpletuner.helpers.configuration.schema.resolution import (
    PIXELS_PER_MEGAPIXEL,
    nearest_multiple,
    square_edge_px,
    square_size,
)
from simpletuner.helpers.configuration.schema.sections import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
    ValidationConfig,
)
from simpletuner.helpers.configuration.schema.tracking import TrackingConfig
from simpletuner.helpers.configuration.schema.values import is_off, repository_problem
from simpletuner.helpers.configuration.text.problems import nearest, shown
from simpletuner.helpers.contracts import ModelSpec, Size

_NOT_EXPORTED = ("use_tucker", "train_norm")
"""Arguments that give a layer tensors which an export for ComfyUI does not write."""


def family_of(
    raw: Mapping[str, RawValue], families: Mapping[str, ModelSpec], source: Source
) -> ModelSpec | None:
    """The spec of model_family, or None with the problem noted."""
    known = ", ".join(sorted(families))
    if "model_family" not in raw:
        source.add("model_family", f"required, but missing. Known families: {known}.")
        return None
    name = raw["model_family"].value
    if not isinstance(name, str) or name not in families:
        hint = nearest(name, families) if isinstance(name, str) else ""
        source.reject("model_family", name, f"not a model family here. Known families: {known}.{hint}")
        return None
    return families[name]


def family_defaults(raw: Mapping[str, RawValue], spec: ModelSpec) -> dict[str, object]:
    """The family's values of keys that the user left out."""
    defaults: dict[str, object] = {
        "aspect_bucket_alignment": spec.pixel_alignment,
        "validation_guidance": spec.default_guidance,
    }
    in_area = "resolution_type" in raw and raw["resolution_type"].value == "area"
    edge = spec.default_resolution
    defaults["resolution"] = round(edge**2 / PIXELS_PER_MEGAPIXEL, 3) if in_area else float(edge)
    flavour = raw["model_flavour"].value if "model_flavour" in raw else spec.default_flavour
    if "pretrained_model_name_or_path" not in raw:
        defaults["model_flavour"] = spec.default_flavour
        defaults["pretrained_model_name_or_path"] = spec.flavours.get(
            str(flavour), spec.flavours[spec.default_flavour]
        )
    if _value(raw, "model_type") == "full":
        defaults["learning_rate"] = full_learning_rate(_value(raw, "optimizer"))
    elif _value(raw, "model_type") not in WITHOUT_ADAPTER:
        defaults["peft_lora_target_modules"] = _named_targets(raw, spec) or spec.lora_targets
    if spec.denoiser_name == "unet" and not is_off(_value(raw, "enable_group_offload")):
        defaults["group_offload_type"] = "leaf_level"
    return {key: value for key, value in defaults.items() if key not in raw}


def full_learning_rate(optimizer: object) -> float:
    """Default of model_type full: a tenth of an adapter's; 1 where the optimiser estimates its step."""
    record = OPTIMIZERS.named(optimizer or "adamw")
    rate = OPTIMIZERS["adamw"].default_learning_rate if record is None else record.default_learning_rate
    return rate if rate == 1.0 else rate / 10.0


def _value(raw: Mapping[str, RawValue], key: str) -> JsonValue:
    return raw[key].value if key in raw else None


def check_model(model: Validated[ModelConfig], spec: ModelSpec, source: Source) -> None:
    """Check that the family has the flavour and the prediction type."""
    section = model.section
    if section is None:
        return
    flavour, prediction_type = section.model_flavour, section.prediction_type
    if flavour is not None and flavour not in spec.flavours:
        allowed, hint = ", ".join(spec.flavours), nearest(flavour, spec.flavours)
        advice = UNSUPPORTED_VALUES.get(("model_flavour", flavour))
        known = f"known from SimpleTuner, not supported here. {advice}"
        source.reject("model_flavour", flavour, known if advice else f"must be one of {allowed}.{hint}")
    if prediction_type not in (None, *spec.prediction_types):
        allowed = ", ".join(spec.prediction_types)
        source.reject("prediction_type", prediction_type, f"{spec.name} predicts {allowed}.")


def check_family(
    sections: Sequence[Validated[Any]], spec: ModelSpec, *, families: Mapping[str, ModelSpec], source: Source
) -> None:
    """Check that no key of other families is set, and run the family's own checks."""
    foreign = frozenset().union(*(each.own_keys for each in families.values())) - spec.own_keys
    values: dict[str, object] = {}
    for validated in sections:
        if validated.section is None:
            continue
        defaults = {key: field.default for key, field in type(validated.section).model_fields.items()}
        values |= {key: value for key, value in validated.section if key not in validated.invalid_keys}
        for key in sorted(foreign & defaults.keys() - validated.invalid_keys):
            if values[key] != defaults[key]:
                source.add(key, f"means nothing to model_family {spec.name}. Remove it.")
    for key, problem in (spec.problems(values) if spec.problems is not None else {}).items():
        source.add(key, problem)


def check_noise(noise: Validated[NoiseConfig], source: Source) -> None:
    """Check that the keys of noise, noise levels and loss weights fit together."""
    for keys, text in noise_problems(noise.section) if noise.section is not None else ():
        if noise.if_valid(*keys) is not None:
            source.add(keys[0], text)


def check_lora_preset(
    raw: Mapping[str, RawValue], adapter: Validated[AdapterConfig], *, spec: ModelSpec, source: Source
) -> None:
    """Check that the family has the named target layers, and that peft_lora_target_modules agrees."""
    section = adapter.if_valid("lora_type", "slider_lora_target")
    if section is not None and section.slider_lora_target and section.lora_type == STANDARD.name:
        has_preset = spec.lora_preset_key is not None and not is_off(_value(raw, spec.lora_preset_key))
        _check_slider_target(
            section, spec, preset=spec.lora_preset_key if has_preset else None, source=source
        )
        return
    key = spec.lora_preset_key
    if key is None or key not in raw or raw[key].value is None:
        return
    found = raw[key].value
    if found not in spec.lora_presets:
        hint = nearest(str(found), spec.lora_presets)
        known = ", ".join(spec.lora_presets)
        source.reject(key, found, f"must be one of {known}.{hint}")
    elif adapter.section is not None:
        modules = adapter.section.peft_lora_target_modules
        if modules is not None and set(modules) != set(spec.lora_presets[str(found)]):
            source.add(key, "names other layers than peft_lora_target_modules. Remove one of the two.")


def _check_slider_target(
    adapter: AdapterConfig, spec: ModelSpec, *, preset: str | None, source: Source
) -> None:
    key, modules = "slider_lora_target", adapter.peft_lora_target_modules
    if not spec.slider_targets:
        source.add(key, f"{spec.name} has no such layers here. Name them in peft_lora_target_modules.")
    elif modules is not None and set(modules) != set(spec.slider_targets):
        source.add(key, "names other layers than peft_lora_target_modules. Remove one of the two.")
    elif preset is not None:
        source.add(key, f"names other layers than {preset}. Remove one of the two.")


def _named_targets(raw: Mapping[str, RawValue], spec: ModelSpec) -> tuple[str, ...] | None:
    """The layers that slider_lora_target or the family's preset names."""
    if not is_off(_value(raw, "slider_lora_target")):
        return spec.slider_targets
    key = spec.lora_preset_key
    return spec.lora_presets.get(str(raw[key].value)) if key is not None and key in raw else None


def check_format(
    adapter: Validated[AdapterConfig], lycoris: LycorisConfig | None, *, spec: ModelSpec, source: Source
) -> None:
    """Check that lora_format comfyui can hold the adapter."""
    section = adapter.if_valid("lora_format", "lora_type", "use_dora", "lora_init_type")
    if section is None or section.lora_format == "diffusers":
        return
    reasons = []
    if spec.original_name is None:
        reasons.append(f"{spec.name} has no such key names here")
    if section.lora_type == STANDARD.name:
        if section.use_dora:
            reasons.append("it computes use_dora otherwise")
    elif lycoris is not None:
        entries = lycoris.apply_preset.entries
        algorithms = {lycoris.algo, *(entry.algo for entry in entries if entry.algo is not None)}
        others = sorted(name for name in algorithms if not ALGORITHMS[name].exports_to_comfyui)
        reasons += [f"algo {name} needs no export, or has none" for name in others]
        options = [lycoris.extra, *map(dict, entries)]
        reasons += [
            f"{name} has no export" for name in _NOT_EXPORTED if any(each.get(name) for each in options)
        ]
        decomposed = [each for each in options if each.get("weight_decompose")]
        if any(each.get("wd_on_out", lycoris.extra.get("wd_on_out")) is not False for each in decomposed):
            reasons.append("it computes weight_decompose rightly with wd_on_out false only")
    if reasons:
        text = f"comfyui: {'; '.join(reasons)}. Change that, or set lora_format to diffusers."
        source.add("lora_format", text)


def check_slider(
    adapter: Validated[AdapterConfig],
    lycoris: LycorisConfig | None,
    *,
    datasets: Sequence[DatasetConfig],
    source: Source,
) -> None:
    """Check that the adapter's effect is proportional to its strength where datasets have slider_strength."""
    section = adapter.if_valid("lora_type", "use_dora", "lora_init_type")
    if section is None or not slider_strengths(datasets):
        return
    text = "its effect is not proportional to the strength, which slider_strength of a dataset sets"
    if section.lora_type == STANDARD.name:
        if section.use_dora:
            source.add("use_dora", f"true: {text}. Set it to false.")
        if section.lora_init_type in CHANGE_THE_BASE:
            source.add("lora_init_type", f"{section.lora_init_type}: {text}. Use default or gaussian.")
    elif lycoris is not None:
        entries = [lycoris.extra, *map(dict, lycoris.apply_preset.entries)]
        algorithms = {lycoris.algo, *(str(each["algo"]) for each in entries if each.get("algo"))}
        unfit = sorted(name for name in algorithms if not ALGORITHMS[name].is_proportional)
        unfit += [name for name in DISPROPORTIONATE if any(each.get(name) for each in entries)]
        if unfit:
            others = ", ".join(name for name, each in ALGORITHMS.items() if each.is_proportional)
            without = " and ".join(DISPROPORTIONATE)
            source.add(
                "lycoris_config", f"{', '.join(unfit)}: {text}. Use one of {others}, without {without}."
            )


def check_precision(
    precision: Validated[PrecisionConfig],
    adapter: Validated[AdapterConfig],
    lycoris: LycorisConfig | None,
    *,
    spec: ModelSpec,
    source: Source,
) -> None:
    """Check that quantised text encoders exist and that the adapter trains on a quantised denoiser."""
    for number in range(spec.num_text_encoders + 1, 5):
        key = f"text_encoder_{number}_precision"
        section = precision.if_valid(key)
        if section is not None and getattr(section, key) != UNCHANGED:
            count = spec.num_text_encoders
            has = f"{spec.name} has {count} text encoder{'s' if count > 1 else ''}"
            source.reject(key, getattr(section, key), f"{has}. Remove it.")
    section = precision.if_valid("base_model_precision")
    trained = adapter.if_valid("lora_type", "lora_init_type")
    if section is None or trained is None or section.base_model_precision == UNCHANGED:
        return
    wanted = section.base_model_precision
    if trained.lora_type == STANDARD.name:
        if trained.lora_init_type in CHANGE_THE_BASE:
            text = f"{trained.lora_init_type}: cannot change base weights in base_model_precision {wanted}."
            source.add("lora_init_type", f"{text} Use default or gaussian.")
    elif lycoris is not None:
        for reason in dict.fromkeys(_unquantisable(lycoris, PRECISIONS[wanted])):
            source.add("base_model_precision", f"{wanted}: {reason}, or set it to {UNCHANGED}.")


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
    source: Source,
) -> None:
    """Check that the other settings work with group offloading."""
    section = precision.if_valid("enable_group_offload", "group_offload_type", "base_model_precision")
    if section is None or not section.enable_group_offload:
        return
    if section.group_offload_type == "block_level" and spec.denoiser_name == "unet":
        text = "block_level needs a transformer; use leaf_level for a UNet."
        source.add("group_offload_type", text)
    record = PRECISIONS[section.base_model_precision]
    if not record.works_with_group_offload:
        others = ", ".join(name for name, each in PRECISIONS.items() if each.works_with_group_offload)
        text = (
            f"true: {record.name} layers stay on the device. Set base_model_precision to one of {others}, or "
            "enable_group_offload to false."
        )
        source.add("enable_group_offload", text)
    trained = training.if_valid("gradient_checkpointing")
    if trained is not None and not trained.gradient_checkpointing:
        text = "true: needs gradient_checkpointing. Set gradient_checkpointing to true."
        source.add("enable_group_offload", text)
    trained = training.if_valid("gradient_checkpointing_interval")
    if trained is not None and (trained.gradient_checkpointing_interval or 1) > 1:
        text = (
            f"{trained.gradient_checkpointing_interval}: enable_group_offload needs every block to be "
            "recomputed. Set one of the two to 1 or false."
        )
        source.add("gradient_checkpointing_interval", text)
    compared = validation.if_valid("validation_compared_config")
    if compared is not None and compared.validation_compared_config is not None:
        text = "does not work with enable_group_offload. Remove one of the two."
        source.add("validation_compared_config", text)


def check_alignment(data: Validated[DataConfig], spec: ModelSpec, source: Source) -> None:
    """Check that the model can take the bucket sizes and that a bucket fits the resolution."""
    section = data.if_valid("aspect_bucket_alignment")
    if section is None or section.aspect_bucket_alignment is None:
        return
    alignment = section.aspect_bucket_alignment
    if alignment % spec.minimum_alignment:
        text = f"must be a multiple of {spec.minimum_alignment}. Use {spec.pixel_alignment}."
        source.reject("aspect_bucket_alignment", alignment, text)
        return
    edge = square_edge_px(section.resolution, section.resolution_type)
    if data.if_valid("resolution", "resolution_type") is not None and edge < alignment:
        source.add(
            "resolution",
            f"{section.resolution:g} is {edge:.0f} px, below aspect_bucket_alignment {alignment}. Raise it.",
        )


def check_validation(validation: Validated[ValidationConfig], spec: ModelSpec, source: Source) -> None:
    """Check that the family has the sampler and can take the validation sizes."""
    sampler = validation.if_valid("validation_noise_scheduler")
    name = sampler.validation_noise_scheduler if sampler is not None else None
    samplers = samplers_of(spec)
    if name is not None and name not in samplers:
        known = ", ".join(samplers)
        text = f"model_family {spec.name} is sampled with {known}. Use one, or null for the model's own."
        source.reject("validation_noise_scheduler", name, text)
    section = validation.if_valid("validation_resolution")
    step = spec.minimum_alignment
    for size in section.validation_resolution if section is not None else ():
        if size.width % step or size.height % step:
            near = Size(height=nearest_multiple(size.height, step), width=nearest_multiple(size.width, step))
            source.add(
                "validation_resolution", f"{size}: width and height must be multiples of {step}. Use {near}."
            )


def check_ema(ema: Validated[EmaConfig], optimizer: Validated[OptimizerConfig], source: Source) -> None:
    """Check that the optimiser keeps no average of its own, which an EMA would average again."""
    section, trained = ema.if_valid("use_ema"), optimizer.if_valid("optimizer")
    if section is None or trained is None or not section.use_ema:
        return
    if OPTIMIZERS[trained.optimizer].has_averages:
        text = f"true: {trained.optimizer} averages its weights by itself, and files and images have that"
        source.add("use_ema", f"{text} average. Remove use_ema, or choose another optimizer.")


def check_evaluation(evaluation: Validated[EvaluationConfig], file: DatasetFile, source: Source) -> None:
    """Check that eval_dataset_id names entries with held-out images."""
    section = evaluation.if_valid("eval_dataset_id")
    for name in () if section is None else section.eval_dataset_id:
        dataset = next((each for each in file.datasets if each.id == name), None)
        if name not in file.names:
            known = [each.id for each in file.datasets if each.holds_out]
            hint = nearest(name, known) or f" Known: {', '.join(known)}." if known else ""
            source.reject("eval_dataset_id", name, f"no dataset has this id.{hint}")
        elif dataset is not None and not dataset.holds_out:
            text = (
                'holds no images out. Set "dataset_type": "eval" or eval_share in that entry, or remove the '
                "key. Reference images of validation are validation_reference_images."
            )
            source.reject("eval_dataset_id", name, text)


def check_repository(
    tracking: Validated[TrackingConfig], publishing: Validated[PublishingConfig], source: Source
) -> None:
    """Check that tracker_project_name can name the repository where hub_model_id is not set."""
    section = publishing.if_valid("push_to_hub", "hub_model_id")
    project = tracking.if_valid("tracker_project_name")
    if section is None or project is None or not section.push_to_hub or section.hub_model_id is not None:
        return
    if problem := repository_problem(project.tracker_project_name):
        text = f"tracker_project_name {shown(project.tracker_project_name)} {problem}"
        source.add("hub_model_id", f"{text} Set hub_model_id, or rename the project.")


def check_regularisation(
    regularisation: Validated[RegularisationConfig],
    adapter: Validated[AdapterConfig],
    datasets: Sequence[DatasetConfig],
    *,
    source: Source,
) -> None:
    """Check that the model without the adapter is the base model, where its prediction is the target."""
    section = regularisation.if_valid("regularisation_target")
    trained = adapter.if_valid("lora_type", "lora_init_type")
    if section is None or trained is None or section.regularisation_target != "base":
        return
    changes_base = trained.lora_type == STANDARD.name and trained.lora_init_type in CHANGE_THE_BASE
    if changes_base and any(dataset.is_regularisation_data for dataset in datasets):
        source.add(
            "lora_init_type",
            f"{trained.lora_init_type} changes the base weights, whose prediction is the target of "
            "is_regularisation_data. Use default or gaussian, or set regularisation_target to data.",
        )


def check_masks(
    masks: Validated[MaskConfig],
    noise: Validated[NoiseConfig],
    *,
    kinds: Set[str],
    source: Source,
) -> None:
    """Check that keys of masks have masks to act on, and that the loss can be weighted by them.

    `kinds` are those of the masks that datasets have.
    """
    for key, field in MaskConfig.model_fields.items():
        value = None if key in masks.invalid_keys or masks.section is None else dict(masks.section)[key]
        if value is None or value == field.default:
            continue
        if not kinds:
            text = "has no effect without masks. Remove it, or name an entry of masks in conditioning_data."
            source.reject(key, value, text)
        elif key == "masked_loss_probability" and kinds <= {"mask", "alpha"}:
            text = "is for masks of conditioning_type segmentation; others always apply. Remove it."
            source.reject(key, value, text)
    section = noise.if_valid("loss_type")
    if kinds and section is not None:
        loss = LOSSES[section.loss_type]
        if not (isinstance(loss, Loss) and loss.takes_mask):
            allowed = ", ".join(
                each.name for each in LOSSES.values() if isinstance(each, Loss) and each.takes_mask
            )
            text = f"a dataset has masks, which this loss does not take. Use one of {allowed}."
            source.reject("loss_type", section.loss_type, text)


def check_references(
    model: Validated[ModelConfig],
    data: Validated[DataConfig],
    file: DatasetFile,
    *,
    spec: ModelSpec,
    families: Mapping[str, ModelSpec],
    source: Source,
) -> None:
    """Check that the model sees references, and that those of one image have no captions of their own."""
    ids = {each.id for each in file.references}
    served = [
        each.id for each in file.datasets if each.conditioning or ids.intersection(each.conditioning_data)
    ]
    section = model.if_valid("model_flavour", "pretrained_model_name_or_path")
    if served and section is not None:
        flavour = section.model_flavour or spec.default_flavour
        if not spec.sees_references(section.model_flavour, section.pretrained_model_name_or_path):
            source.add(
                "model_flavour",
                f"{spec.name} {flavour} sees no reference images, but dataset {served[0]} has some. Remove "
                f"them{_flavours_with_references(families)}.",
            )
    sampling = data.if_valid("conditioning_multidataset_sampling")
    captioned = [each.id for each in file.references if each.captions]
    captioned += [
        f"{one.type} of {each.id}" for each in file.datasets for one in each.conditioning if one.captions
    ]
    if sampling is not None and sampling.conditioning_multidataset_sampling == "combined" and captioned:
        text = f"an image then has its own caption, but {captioned[0]!r} has captions. Remove them, or use "
        text += "random."
        source.reject("conditioning_multidataset_sampling", "combined", text)


def _flavours_with_references(families: Mapping[str, ModelSpec]) -> str:
    names = [
        f"{name} {flavour}"
        for name, spec in sorted(families.items())
        for flavour in spec.flavours
        if flavour in spec.reference_flavours
    ]
    return f", or train one of {', '.join(names)}" if names else ""


def check_output(
    checkpoint: Validated[CheckpointConfig],
    folders: Mapping[str, Path],
    source: Source,
) -> None:
    """Check that output_dir is outside every dataset's folder, by its id."""
    section = checkpoint.if_valid("output_dir")
    if section is None:
        return
    for dataset_id, folder in folders.items():
        if section.output_dir.is_relative_to(folder):
            text = f"is inside instance_data_dir of dataset {dataset_id}. Choose another."
            source.reject("output_dir", str(section.output_dir), text)


def check_writable(checkpoint: Validated[CheckpointConfig], source: Source) -> None:
    """Check that files can be made in output_dir, or that it can be made."""
    section = checkpoint.if_valid("output_dir")
    if section is None:
        return
    folder = next(each for each in (section.output_dir, *section.output_dir.parents) if each.exists())
    shown = str(section.output_dir)
    if not folder.is_dir():
        source.reject("output_dir", shown, f"{folder} is a file. Give a folder.")
    elif not os.access(folder, os.W_OK | os.X_OK):
        source.reject("output_dir", shown, f"no permission to write in {folder}. Choose a writable folder.")


def check_comparison(run: RunConfig, source: Source) -> None:
    """Check that the compared run adapts the same model and has another output_dir."""
    other = run.compared_with
    if other is None:
        return
    key = "validation_compared_config"
    for name, value in run.model:
        theirs = getattr(other.model, name)
        if name == "model_flavour" or (name == "model_type" and not other.model.is_full):
            continue  # the one only names the default repository; the other leaves the model as it is
        if theirs != value:
            found, here = shown(theirs), shown(value)
            source.add(key, f"that run's {name} is {found}, here it is {here}. Name a run on the same model.")
    if other.checkpoint.output_dir == run.checkpoint.output_dir:
        source.add(key, "that run has the same output_dir. Change one of them.")
    init = other.adapter.lora_init_type
    if other.adapter.lora_type == STANDARD.name and init in CHANGE_THE_BASE:
        source.add(key, f"that run's lora_init_type {init} changes the base weights. Name another run.")


def training_size(data: DataConfig, spec: ModelSpec) -> Size:
    """Default size of validation images: the bucket of a square image."""
    return square_size(
        resolution=data.resolution,
        resolution_type=data.resolution_type,
        alignment=data.alignment(spec.pixel_alignment),
    )
