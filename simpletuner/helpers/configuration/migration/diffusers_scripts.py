"""Command lines of diffusers' example scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import (
    expanded,
    fit_to_quantised,
    put_lora,
    put_optimizer,
)
from simpletuner.helpers.configuration.migration.arithmetic import Length, steps_per_epoch
from simpletuner.helpers.configuration.migration.command_line import Command
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.noise import levels_of_scheme, put_offset_noise
from simpletuner.helpers.configuration.migration.paths import Place, unique_id
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.text_encoders import put_text_encoders
from simpletuner.helpers.configuration.migration.whole_models import fit_to_whole_model
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")
_OF_PRODIGY = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
_OURS = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "adam_weight_decay": "weight_decay",
}


def read_diffusers(command: Command, place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    """The configuration of a call of an example script.

    Raises:
        ConfigError: The script is of another kind or model family, or the call is not whole.
    """
    table = load_table("diffusers")
    fact: Mapping[str, Any] = table.facts["scripts"][command.script]
    if "refused" in fact:
        raise ConfigError(f"{command.script}.py {fact['refused']}")
    draft = Draft(table.program)
    family = str(fact["model_family"])
    draft.config["model_family"] = family
    launcher = {
        key: value for key, value in command.launcher.items() if key in ("num_processes", "mixed_precision")
    }
    values = launcher | dict(command.options)
    rows = table.rows("command")
    settings = Settings(values, rows, draft, family=family)
    # Defaults of this script that differ from the others'; not the user's, so the decisions do not show them.
    defaults = dict(fact.get("defaults", {}))
    _model(settings, specs[family], fact=fact, place=place)
    trains_all = bool(fact.get("trains_all"))
    if not trains_all:
        _network(settings, family)
    _data(settings, place, defaults, drops=bool(fact["drops"]))
    _optimizer(settings, defaults)
    _noise(settings, family)
    _validation(settings)
    _memory(settings)
    if settings.text("output_dir"):
        settings.put("output_dir", "output_dir", place.path(settings.text("output_dir")))
    _text_encoders(settings, specs[family], defaults)
    settings.finish()
    if draft.config.get("lr_scheduler") == "constant":
        draft.withdraw("lr_warmup_steps", "constant has no warm-up.")
    if trains_all:
        fit_to_whole_model(draft)
    fit_to_quantised(draft)
    return draft


def _network(settings: Settings, family: str) -> None:
    table, draft = load_table("diffusers"), settings.draft
    targets = [each.strip() for each in settings.text("lora_layers").split(",") if each.strip()]
    if not targets:
        targets = expanded(table.facts["targets"][family], table.facts["single_blocks"])
    rank = settings.whole("rank")
    alpha = settings.number("lora_alpha", rank if family not in table.facts["flow_families"] else 4.0)
    put_lora(draft, rank=rank, alpha=alpha, targets=targets)
    settings.decide("rank", "translated", ours=f"lora_rank: {rank}", text="")
    for key, ours in (("lora_alpha", f"lora_alpha: {alpha:g}"), ("lora_layers", "peft_lora_target_modules")):
        if settings.has(key):
            settings.decide(key, "translated", ours=ours, text="")


def _text_encoders(settings: Settings, spec: ModelSpec, defaults: Mapping[str, Any]) -> None:
    key, rate_key = "train_text_encoder", "text_encoder_lr"
    if not settings.flag(key):
        for each in (key, rate_key):
            if settings.has(each):
                settings.decide(each, "no effect", text="The text encoders are not trained.")
    elif spec.text_encoder_lora_targets:
        rate = settings.number(rate_key, float(defaults.get(rate_key, settings.number("learning_rate"))))
        ours = put_text_encoders(settings.draft, [rate])
        settings.decide(key, "approximate", ours=ours, text=settings.rows[key].text)
        settings.decide(rate_key, "translated", ours=f"{rate_key}: {rate:g}", text="")
    else:
        text = f"The text encoders of {spec.name} are not trained here; the result differs."
        for each in (key, rate_key):
            if settings.has(each):
                settings.decide(each, "not translated", text=text)


def _model(settings: Settings, spec: ModelSpec, *, fact: Mapping[str, Any], place: Place) -> None:
    key = "pretrained_model_name_or_path"
    path = place.path(settings.text(key))
    if not path:
        raise ConfigError(f"--{key} is missing: this is no whole call of an example script.")
    flavour = next((name for name, repository in spec.flavours.items() if repository == path), None)
    wanted = flavour or fact.get("model_flavour")
    if wanted:
        settings.draft.config["model_flavour"] = wanted
    settings.put(key, key, path)
    vae = "pretrained_vae_model_name_or_path"
    if settings.text(vae):
        settings.put(vae, vae, place.path(settings.text(vae)))


def _data(settings: Settings, place: Place, defaults: Mapping[str, Any], *, drops: bool) -> None:
    draft = settings.draft
    key = next((each for each in ("instance_data_dir", "train_data_dir") if settings.text(each)), "")
    folder = place.path(settings.text(key)) if key else ""
    if not folder and settings.text("dataset_name"):
        folder = f"datasets/{PurePosixPath(settings.text('dataset_name')).name}"
        settings.decide("dataset_name", "not translated", text=settings.rows["dataset_name"].text)
        draft.to_do.append(
            f"Put the images of {settings.text('dataset_name')}, with text files, into {folder}."
        )
    if not folder:
        raise ConfigError("--instance_data_dir is missing: this is no whole call of an example script.")
    entry: dict[str, JsonValue] = {
        "id": unique_id(Path(folder).name, ()),
        "type": "local",
        "instance_data_dir": folder,
    }
    if key:
        settings.decide(key, "translated", ours=f"instance_data_dir: {folder}")
    settings.put("repeats", "repeats", max(0, settings.whole("repeats") - 1), into=entry)
    edge = (
        settings.number("resolution")
        if settings.has("resolution")
        else float(defaults.get("resolution", 512))
    )
    entry |= {"resolution": int(edge), "resolution_type": "pixel", "crop": True, "crop_aspect": "square"}
    settings.decide(
        "resolution", "translated", ours=f"resolution: {int(edge)}, resolution_type: pixel", text=""
    )
    entry["crop_style"] = "center" if settings.flag("center_crop") else "random"
    settings.decide("center_crop", "translated", ours=f"crop_style: {entry['crop_style']}", text="")
    if settings.flag("random_flip"):
        settings.put("random_flip", "random_flip", True, into=entry)
    for each in ("aspect_ratio_buckets", "use_aspect_ratio_buckets"):
        if settings.flag(each):
            entry |= {"crop": False, "resolution_type": "pixel_area"}
            settings.skip(each, outcome="approximate")
    _captions(settings, entry)
    if settings.has("max_train_samples"):
        settings.put("max_train_samples", "max_num_samples", settings.whole("max_train_samples"), into=entry)
    draft.datasets.append(entry)
    images = place.images(folder, with_subfolders=False)
    number_of_images = len(images or ()) * max(1, settings.whole("repeats"))
    if settings.has("max_train_samples"):
        number_of_images = min(number_of_images, settings.whole("max_train_samples"))
    _length(settings, defaults, images=number_of_images, drops=drops)


def _captions(settings: Settings, entry: dict[str, JsonValue]) -> None:
    if settings.text("instance_prompt") and not settings.text("caption_column"):
        settings.put("instance_prompt", "instance_prompt", settings.text("instance_prompt"), into=entry)
        entry["caption_strategy"] = "instanceprompt"
    else:
        entry["caption_strategy"] = "textfile"
        if settings.has("instance_prompt"):
            settings.decide("instance_prompt", "no effect", text="The captions count.")


def _length(settings: Settings, defaults: Mapping[str, Any], *, images: int, drops: bool) -> None:
    draft = settings.draft
    batch = (
        settings.whole("train_batch_size")
        if settings.has("train_batch_size")
        else int(defaults.get("train_batch_size", 4))
    )
    settings.put("train_batch_size", "train_batch_size", batch, text="")
    accumulation = max(1, settings.whole("gradient_accumulation_steps"))
    processes = max(1, settings.whole("num_processes", 1))
    batches = images // batch if drops else math.ceil(images / batch)
    per_epoch = steps_per_epoch(batches, accumulation=accumulation, processes=processes)
    joined = f", {accumulation} to a step" if accumulation > 1 else ""
    formula = f"an epoch has {counted(images, 'image')} in {counted(batches, 'batch', 'batches')}{joined}"
    used = batches * batch if drops else images
    epochs = (
        settings.whole("num_train_epochs")
        if settings.has("num_train_epochs")
        else int(defaults.get("num_train_epochs", 1))
    )
    if settings.flag("max_train_steps"):
        steps = settings.whole("max_train_steps")
        settings.put("max_train_steps", "max_train_steps", steps, text="")
        samples = round(steps / per_epoch * used) if per_epoch else steps * batch * accumulation * processes
        draft.set_length(Length(steps, samples, per_epoch or None, formula if images else ""))
        if settings.has("num_train_epochs"):
            settings.decide("num_train_epochs", "no effect", text="max_train_steps counts.")
    elif per_epoch:
        steps = epochs * per_epoch
        draft.set_length(
            Length(steps, epochs * used, per_epoch, f"{formula}; {epochs} epochs are {steps:,} steps")
        )
        settings.put(
            "num_train_epochs", "max_train_steps", steps, text=f"{epochs} epochs of {per_epoch:,} steps."
        )
    else:
        text = "The images are not here: the last batch of an epoch may differ from the script's."
        settings.put("num_train_epochs", "num_train_epochs", epochs, outcome="approximate", text=text)
    for key in ("num_processes", "multi_gpu"):
        if settings.has(key):
            settings.decide(
                key, "translated", ours=f"TRAINING_NUM_PROCESSES={processes} for train.sh", text=""
            )


def _optimizer(settings: Settings, defaults: Mapping[str, Any]) -> None:
    draft = settings.draft
    if settings.flag("use_8bit_adam") and settings.text("optimizer").lower() == "adamw":
        settings.values["optimizer"] = "adamw8bit"
        settings.decide("use_8bit_adam", "translated", ours="optimizer: bnb-adamw8bit", text="")
    arguments: dict[str, JsonValue] = {
        "beta1": settings.number("adam_beta1", 0.9),
        "beta2": settings.number("adam_beta2", 0.999),
        "eps": settings.number("adam_epsilon", 1e-8),
        "weight_decay": settings.number("adam_weight_decay", float(defaults.get("adam_weight_decay", 1e-4))),
    }
    is_prodigy = settings.text("optimizer").lower() == "prodigy"
    if is_prodigy:
        for key in _OF_PRODIGY:
            if settings.has(key):
                arguments[key.removeprefix("prodigy_")] = settings.value(key)
    put_optimizer(settings, "optimizer", arguments, arguments_key="", defaults={})
    for key in (*_OF_ADAM, *_OF_PRODIGY):
        if settings.has(key):
            counts = key in _OF_ADAM or is_prodigy
            name = _OURS.get(key, key.removeprefix("prodigy_"))
            settings.decide(
                key, "translated" if counts else "no effect", ours=f"optimizer_config: {name}", text=""
            )
    rate = settings.number("learning_rate")
    batch, accumulation = (
        int(str(draft.config["train_batch_size"])),
        max(1, settings.whole("gradient_accumulation_steps")),
    )
    if settings.flag("scale_lr"):
        factor = batch * accumulation * max(1, settings.whole("num_processes", 1))
        settings.decide(
            "scale_lr", "translated", ours=f"learning_rate: {rate * factor:g}", text=f"{rate:g} x {factor}."
        )
        rate = float(f"{rate * factor:.12g}")
    settings.put("learning_rate", "learning_rate", rate, text="")
    settings.put("lr_warmup_steps", "lr_warmup_steps", settings.whole("lr_warmup_steps"), text="")


def _noise(settings: Settings, family: str) -> None:
    facts, draft = load_table("diffusers").facts, settings.draft
    keys = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "guidance_scale")
    if family not in facts["flow_families"]:
        if settings.has("noise_offset"):
            put_offset_noise(settings, "noise_offset")
        for key in keys:
            if settings.has(key):
                settings.decide(key, "no effect", text="Of flow matching.")
        return
    # The scripts draw from the scheduler's noise levels before a number of steps is set: unshifted.
    draft.config["flow_schedule_shift"] = 0
    way = settings.text("weighting_scheme").lower()
    levels = levels_of_scheme(
        way,
        mean=settings.number("logit_mean"),
        spread=settings.number("logit_std", 1.0),
        scale=settings.number("mode_scale", 1.29),
    )
    draft.config.update(levels or {"flow_use_uniform_schedule": True})
    outcome: Outcome = "translated" if levels else "not translated"
    text = "" if levels else "Noise levels are uniform, and all weigh the same; the result differs."
    settings.decide("weighting_scheme", outcome, ours=", ".join(levels), text=text)
    for key, scheme in (
        ("logit_mean", "logit_normal"),
        ("logit_std", "logit_normal"),
        ("mode_scale", "mode"),
    ):
        if settings.has(key):
            counts = bool(levels) and way == scheme
            settings.decide(key, "translated" if counts else "no effect", ours=", ".join(levels), text="")
    flavour = str(draft.config.get("model_flavour", ""))
    if flavour not in facts["without_guidance"]:
        settings.put("guidance_scale", facts["guidance_key"], settings.number("guidance_scale"), text="")
    elif settings.has("guidance_scale"):
        settings.decide("guidance_scale", "no effect", text="This model has no guidance embedding.")


def _validation(settings: Settings) -> None:
    draft = settings.draft
    if not settings.text("validation_prompt"):
        for key in ("validation_epochs", "num_validation_images"):
            if settings.has(key):
                settings.decide(key, "no effect", text="There is no validation_prompt.")
        return
    settings.put(
        "num_validation_images",
        "num_validation_images",
        max(1, settings.whole("num_validation_images")),
        text="",
    )
    per_epoch = draft.length.steps_per_epoch if draft.length else None
    epochs = settings.whole("validation_epochs")
    if per_epoch:
        text = f"{epochs} x {per_epoch:,} steps of an epoch."
        settings.put("validation_epochs", "validation_step_interval", epochs * per_epoch, text=text)
    else:
        draft.config["validation_step_interval"] = 0
        text = "The steps of an epoch are not known without the images: set validation_step_interval."
        settings.decide("validation_epochs", "not translated", text=text)


def _memory(settings: Settings) -> None:
    settings.put("gradient_checkpointing", "gradient_checkpointing", settings.flag("gradient_checkpointing"))
    for key, ours in (("bnb_quantization_config_path", "nf4-bnb"), ("do_fp8_training", "fp8-torchao")):
        if settings.flag(key):
            settings.put(key, "base_model_precision", ours, outcome="approximate")
