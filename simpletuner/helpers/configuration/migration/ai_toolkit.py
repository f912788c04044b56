"""ai-toolkit: its yaml and json files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.choices.captions import text_suffixes
from simpletuner.helpers.configuration.migration.adapters import (
    expanded,
    fit_to_quantised,
    number,
    put_lora,
    put_lycoris,
    put_optimizer,
)
from simpletuner.helpers.configuration.migration.ai_toolkit_references import (
    IMAGES,
    prompt_images,
    reference_entries,
)
from simpletuner.helpers.configuration.migration.arithmetic import Length
from simpletuner.helpers.configuration.migration.averages import put_ema
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.noise import put_offset_noise
from simpletuner.helpers.configuration.migration.paths import Place, is_of_other_system, unique_id
from simpletuner.helpers.configuration.migration.prompts import SamplePrompt, prompt_of_line, put_prompts
from simpletuner.helpers.configuration.migration.reading import flattened
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.tags import Tags, put_tags, share_dropout
from simpletuner.helpers.configuration.migration.text_encoders import ai_toolkit_text_encoders
from simpletuner.helpers.configuration.migration.whole_models import fit_to_whole_model
from simpletuner.helpers.configuration.schema.base import NUM_TIMESTEPS
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

# Above every layer's size: LoKr then keeps its larger factor whole, as lokr_full_rank does.
_WHOLE = 10_000


def is_ai_toolkit(content: Mapping[str, JsonValue]) -> bool:
    """Whether an object is a job of ai-toolkit."""
    config = content.get("config")
    return isinstance(config, dict) and isinstance(config.get("process"), list)


def read_ai_toolkit(content: Mapping[str, JsonValue], place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    """The configuration of a job of ai-toolkit.

    Raises:
        ConfigError: The job is of another kind or model family, or has no whole process.
    """
    table = load_table("ai-toolkit")
    config: Any = content["config"]
    processes = config["process"]
    if len(processes) != 1 or not isinstance(processes[0], dict):
        raise ConfigError(
            f"config.process has {len(processes)} entries. One run has one: make a file of each."
        )
    process: dict[str, JsonValue] = dict(processes[0])
    kind = str(process.get("type", ""))
    if kind not in ("sd_trainer", "ui_trainer", "diffusion_trainer"):
        raise ConfigError(
            f"config.process[0].type is {kind!r}, which trains no adapter on images. Give a sd_trainer."
        )
    datasets = process.pop("datasets", None)
    if not isinstance(datasets, list) or not datasets:
        raise ConfigError("config.process[0] has no datasets, so this is no whole job of ai-toolkit.")
    values = dict(flattened(process))
    draft = Draft(table.program)
    fact = _architecture(values)
    draft.config.update(fact)
    family = str(fact["model_family"])
    settings = Settings(values, table.rows("process"), draft, place="process[0].", family=family)
    trains_all = not any(key.startswith("network.") for key in values)
    settings.decide("type", "translated", ours="model_type: full" if trains_all else "lora_type", text="")
    _model(settings, specs[family], place)
    if not trains_all:
        _network(settings, family, place)
    _train(settings, family)
    edits = specs[family].sees_references(
        str(draft.config.get("model_flavour") or "") or None, settings.text("model.name_or_path")
    )
    references = _datasets(settings, datasets, place, alignment=specs[family].minimum_alignment, edits=edits)
    _output(settings, str(config.get("name", "")), place)
    _samples(settings, place if edits else None)
    ai_toolkit_text_encoders(settings, specs[family])
    settings.finish()
    if trains_all:
        fit_to_whole_model(draft)
    fit_to_quantised(draft)
    draft.datasets.extend(references)
    return draft


def _architecture(values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    facts = load_table("ai-toolkit").facts
    name = str(values.get("model.arch") or "").split(":")[0].lower()
    for flag, arch in facts["architecture_flags"].items():
        if not name and not is_off(values.get(f"model.{flag}")):
            name = arch
    fact = facts["architectures"].get(name)
    if fact is None or "refused" in fact:
        reason = facts["other_family"] if fact is None else fact["refused"]
        raise ConfigError(f"process[0].model.arch: {name or 'not given'}: {reason}")
    if is_off(values.get("train.train_unet", True)):
        raise ConfigError(
            "process[0].train.train_unet: false: only adapters of the denoiser are trained here."
        )
    return dict(fact)


def _model(settings: Settings, spec: ModelSpec, place: Place) -> None:
    draft, key = settings.draft, "model.name_or_path"
    path = place.path(settings.text(key))
    flavour = next((name for name, repository in spec.flavours.items() if repository == path), None)
    if flavour is not None:
        draft.config["model_flavour"] = flavour
    if spec.denoiser_name == "transformer" and path.endswith(".safetensors"):
        settings.put(key, "pretrained_transformer_model_name_or_path", path)
    elif path:
        settings.put(key, "pretrained_model_name_or_path", path)
    flags = load_table("ai-toolkit").facts["architecture_flags"]
    for each in ("model.arch", *(f"model.{flag}" for flag in flags)):
        if settings.has(each):
            settings.decide(each, "translated", ours=f"model_family: {spec.name}", text="")
    if settings.text("model.vae_path"):
        settings.put(
            "model.vae_path", "pretrained_vae_model_name_or_path", place.path(settings.text("model.vae_path"))
        )
    _precision(settings, "model.quantize", kind="model.qtype", ours=["base_model_precision"])
    encoders = [f"text_encoder_{index}_precision" for index in range(1, spec.num_text_encoders + 1)]
    if not settings.has("model.quantize_te") and settings.flag("model.quantize"):
        settings.values["model.quantize_te"] = True
    _precision(settings, "model.quantize_te", kind="model.qtype_te", ours=encoders)
    offload = settings.flag("model.layer_offloading") or settings.flag("model.auto_memory")
    if offload:
        settings.put("model.layer_offloading", "enable_group_offload", True)
        if spec.name in load_table("ai-toolkit").facts["denoisers_without_blocks"]:
            draft.config["group_offload_type"] = "leaf_level"


def _precision(settings: Settings, switch: str, *, kind: str, ours: Sequence[str]) -> None:
    if not settings.flag(switch):
        for key in (switch, kind):
            if settings.has(key):
                settings.decide(key, "no effect", text="Off, as here.")
        return
    name = settings.text(kind).lower().split("|")[0]
    found = settings.rows[kind].values.get(name)
    if found is None:
        text = f"{name} has no equal here: the weights keep the format of mixed_precision, with more memory."
        settings.decide(kind, "not translated", text=text)
        settings.decide(switch, "not translated", text=text)
        return
    for key in ours:
        settings.put(switch, key, found.ours, outcome="approximate")
    settings.decide(kind, "approximate", ours=str(found.ours), text="")


def _network(settings: Settings, family: str, place: Place) -> None:
    facts, draft = load_table("ai-toolkit").facts, settings.draft
    kind = settings.text("network.type").lower()
    rank_key = "network.rank" if settings.has("network.rank") else "network.linear"
    rank = settings.whole(rank_key)
    alpha_key = "network.linear_alpha" if settings.has("network.linear_alpha") else "network.alpha"
    alpha, dropout = settings.number(alpha_key), settings.number("network.dropout")
    only = [str(each) for each in settings.items("network.network_kwargs.only_if_contains")]
    ignored = [str(each) for each in settings.items("network.network_kwargs.ignore_if_contains")]
    conv = settings.whole("network.conv") if f"{family} conv" in facts["presets"] else 0
    preset = dict(facts["presets"][f"{family} conv" if conv else family])
    if kind not in ("lora", "locon", "lokr"):
        raise settings.error("network.type", "is not supported here. Known are lora and lokr.")
    if only:
        preset = {"target_name": [f".*{_regular(each)}.*" for each in only], "target_module": []}
        settings.decide(
            "network.network_kwargs.only_if_contains", "translated", ours="apply_preset: target_name"
        )
    if ignored:
        preset["exclude_name"] = [f".*{_regular(each)}.*" for each in ignored]
        settings.decide(
            "network.network_kwargs.ignore_if_contains", "translated", ours="apply_preset: exclude_name"
        )
    if kind == "lokr":
        whole = settings.flag("network.lokr_full_rank")
        factor = settings.whole("network.lokr_factor")
        size = (_WHOLE, float(_WHOLE)) if whole else (rank, alpha)
        put_lycoris(
            draft, algo="lokr", rank=size[0], alpha=size[1], preset=preset, arguments={"factor": factor}
        )
        settings.decide("network.lokr_full_rank", "translated", ours=f"linear_dim: {size[0]}", text="")
        settings.decide("network.lokr_factor", "translated", ours=f"factor: {factor}", text="")
    elif conv or only or ignored or not facts["targets"][family]["names"]:
        arguments: dict[str, JsonValue] = {}
        if conv:
            arguments = {"conv_dim": conv, "conv_alpha": number(settings.number("network.conv_alpha", conv))}
        put_lycoris(draft, algo="lora", rank=rank, alpha=alpha, preset=preset, arguments=arguments)
    else:
        targets = facts["targets"][family]
        names = expanded(targets["names"], targets.get("single_blocks", 1))
        put_lora(draft, rank=rank, alpha=alpha, targets=names, dropout=dropout)
    settings.decide("network.type", "translated", ours=f"lora_type: {draft.config['lora_type']}", text="")
    settings.decide(rank_key, "translated", ours=f"rank {rank}", text="")
    settings.decide(alpha_key, "translated", ours=f"alpha {alpha:g}", text="")
    _network_rest(settings, conv=bool(conv), dropout=dropout, place=place)


def _network_rest(settings: Settings, *, conv: bool, dropout: float, place: Place) -> None:
    for key in ("network.conv", "network.conv_alpha"):
        if settings.has(key):
            outcome: Outcome = "translated" if conv else "no effect"
            text = "" if conv else "A transformer has no convolutions."
            settings.decide(key, outcome, ours=key.replace("network.", "") + "_dim", text=text)
    if settings.has("network.dropout"):
        if settings.draft.lycoris is None:
            settings.decide("network.dropout", "translated", ours=f"lora_dropout: {dropout:g}")
        else:
            settings.skip("network.dropout", "LyCORIS has rank_dropout and module_dropout instead.")
    if settings.text("network.pretrained_lora_path"):
        settings.put(
            "network.pretrained_lora_path",
            "init_lora",
            place.path(settings.text("network.pretrained_lora_path")),
        )
    for key in (
        "network.linear",
        "network.rank",
        "network.alpha",
        "network.linear_alpha",
        "network.lokr_full_rank",
        "network.lokr_factor",
    ):
        if settings.has(key):
            settings.decide(key, "no effect", text="Another key counts, or another type of network.")


def _regular(text: str) -> str:
    return text.replace(".", r"\.").replace("*", ".*")


def _train(settings: Settings, family: str) -> None:
    draft = settings.draft
    shown, hidden = (
        settings.whole("train.gradient_accumulation_steps"),
        settings.whole("train.gradient_accumulation"),
    )
    if shown < 1:
        text = "must be at least 1: accumulating a whole epoch is not possible here."
        raise settings.error("train.gradient_accumulation_steps", text)
    accumulation = max(shown, hidden)
    loops, batch = settings.whole("train.steps"), settings.whole("train.batch_size", 1)
    steps = max(1, loops // shown)
    text = "" if shown == 1 else f"ai-toolkit's {loops:,} steps are batches, {shown} to an optimiser step."
    settings.put("train.steps", "max_train_steps", steps, text=text)
    key = "train.gradient_accumulation" if hidden > 1 else "train.gradient_accumulation_steps"
    settings.put(key, "gradient_accumulation_steps", accumulation, text="")
    for each in ("train.gradient_accumulation", "train.gradient_accumulation_steps"):
        if settings.has(each):
            settings.decide(each, "no effect", text="1, as here.")
    formula = f"{loops:,} steps of {counted(batch * hidden, 'image')}"
    formula += f", {shown} to an optimiser step" if shown > 1 else ""
    draft.set_length(
        Length(steps, loops * batch * hidden if shown == 1 else steps * shown * batch, None, formula)
    )
    settings.put(
        "save.save_every", "checkpoint_step_interval", max(1, settings.whole("save.save_every") // shown)
    )
    rate_key = "train.unet_lr" if settings.has("train.unet_lr") else "train.lr"
    rate = settings.number(rate_key)
    prefix = "train.optimizer_params."
    arguments: dict[str, JsonValue] = {
        key.removeprefix(prefix): value for key, value in settings.values.items() if key.startswith(prefix)
    }
    for name in arguments:
        settings.values.pop(f"{prefix}{name}")
    if arguments:
        settings.values["train.optimizer_params"] = arguments
    prodigy: dict[str, Any] = {"use_bias_correction": False, "safeguard_warmup": False, "eps": 1e-6}
    put_optimizer(
        settings,
        "train.optimizer",
        arguments,
        arguments_key="train.optimizer_params",
        defaults={"prodigy": prodigy, "adamw": {"eps": 1e-6}, "bnb-adamw8bit": {"eps": 1e-6}},
    )
    note = ""
    if draft.config["optimizer"] == "prodigy" and rate < 0.1:
        note, rate = "ai-toolkit takes 1 where a rate below 0.1 is given to prodigy.", 1.0
    settings.put(rate_key, "learning_rate", rate, text=note)
    if settings.has("train.lr"):
        settings.decide("train.lr", "no effect", text="unet_lr counts.")
    warmup = settings.values.pop("train.lr_scheduler_params.num_warmup_steps", None)
    if warmup is not None:
        draft.config["lr_warmup_steps"] = int(float(str(warmup)))
        settings.values["train.lr_scheduler_params"] = {"num_warmup_steps": warmup}
        settings.decide("train.lr_scheduler_params", "translated", ours=f"lr_warmup_steps: {warmup}", text="")
    settings.decide("train.train_unet", "translated", ours="the only way here", text="")
    settings.decide("network.transformer_only", "translated", ours="the only way here", text="")
    ema = "train.ema_config"
    put_ema(settings, f"{ema}.use_ema", numbers={f"{ema}.ema_decay": "ema_decay"}, images="ema_only")
    settings.decide("train.noise_scheduler", "translated", ours="the model's own", text="")
    _timesteps(settings, family)


def _timesteps(settings: Settings, family: str) -> None:
    facts, draft, key = load_table("ai-toolkit").facts, settings.draft, "train.timestep_type"
    linear = [each for each in ("train.linear_timesteps", "train.linear_timesteps2") if settings.flag(each)]
    way = "linear" if linear else settings.text(key).lower()
    is_flow = family in facts["flow_families"]
    _noise(settings, is_flow=is_flow, has_range=not is_flow or way in ("linear", "weighted"))
    if not is_flow:
        if settings.has(key):
            settings.decide(key, "no effect", text="Of flow matching.")
        if settings.has("train.content_or_style"):
            settings.skip("train.content_or_style")
        return
    for each in linear:
        settings.skip(each, outcome="approximate")
    if way in ("linear", "weighted"):
        draft.config.update({**_linear_levels(settings), "flow_schedule_shift": 0})
        outcome: Outcome = "approximate" if way == "weighted" else "translated"
        text = settings.rows[key].text if way == "weighted" else ""
        settings.decide(key, outcome, ours="flow_use_uniform_schedule: true", text=text)
    elif way == "sigmoid":
        draft.config["flow_schedule_shift"] = 0
        settings.decide(key, "translated", ours="flow_schedule_shift: 0", text="")
    elif way in facts["shift_names"]:
        draft.config.update({"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True})
        settings.decide(key, "translated", ours="flow_schedule_auto_shift: true", text="")
    else:
        draft.config["flow_schedule_shift"] = 0
        text = "Not known here: noise levels are those of sigmoid; the result differs."
        settings.decide(key, "not translated", text=text)


def _noise(settings: Settings, *, is_flow: bool, has_range: bool) -> None:
    if settings.has("train.noise_offset") and not is_flow:
        put_offset_noise(settings, "train.noise_offset")
    if has_range:
        _timestep_range(settings)
    for key in ("train.noise_offset", "train.min_denoising_steps", "train.max_denoising_steps"):
        if settings.has(key):
            settings.skip(key)


def _linear_levels(settings: Settings) -> dict[str, JsonValue]:
    """Uniform noise levels, or those of the cube of a uniform number u: u³ or 1 - u³."""
    key = "train.content_or_style"
    shapes: dict[str, tuple[float, float]] = {"style": (1 / 3, 1.0), "content": (1.0, 1 / 3)}
    if (shape := shapes.get(settings.text(key).lower())) is None:
        return {"flow_use_uniform_schedule": True}
    first, second = shape
    settings.decide(key, "translated", ours="flow_use_beta_schedule: true", text="")
    return {
        "flow_use_beta_schedule": True,
        "flow_beta_schedule_alpha": number(first),
        "flow_beta_schedule_beta": number(second),
    }


def _timestep_range(settings: Settings) -> None:
    """ai-toolkit counts denoising steps, from the most noise; here are timesteps."""
    ends = (("train.max_denoising_steps", "min_timestep"), ("train.min_denoising_steps", "max_timestep"))
    for key, ours in ends:
        if settings.has(key) and not settings.rows[key].is_noop(settings.value(key)):
            settings.put(key, ours, min(max(NUM_TIMESTEPS - settings.whole(key), 0), NUM_TIMESTEPS))


def _datasets(
    settings: Settings, entries: Sequence[JsonValue], place: Place, *, alignment: int, edits: bool
) -> list[dict[str, JsonValue]]:
    """Put the datasets; the entries of their references, which come after all of them."""
    references: list[dict[str, JsonValue]] = []
    draft = settings.draft
    trigger = settings.text("trigger_word")
    steps: list[int] = []
    rows = load_table("ai-toolkit").rows("dataset")
    for index, entry in enumerate(entries):
        where = f"process[0].datasets[{index}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} must be an object with folder_path. Correct it.")
        own = Settings(entry, rows, draft, place=f"{where}.")
        num_before = len(draft.datasets)
        _dataset(own, place, trigger=trigger)
        _put_regularisation(own, draft.datasets[num_before:])
        if edits:
            ids = [str(each["id"]) for each in (*draft.datasets, *references)]
            references += reference_entries(own, draft.datasets[num_before:], place, taken=ids)
        steps.append(own.whole("bucket_tolerance"))
        own.finish(into={})
    _drop_full_strengths(draft.datasets)
    if all("is_regularisation_data" in each for each in draft.datasets):
        raise ConfigError("config.process[0].datasets has no images but regularisation images.")
    _dropout(settings)
    if steps:
        draft.config["aspect_bucket_alignment"] = math.lcm(max(1, steps[0]), alignment)
    if trigger:
        settings.skip("trigger_word", outcome="approximate")
    return references


def _drop_full_strengths(datasets: Sequence[dict[str, JsonValue]]) -> None:
    """Remove slider_strength where every dataset has 1: without it a dataset beside a slider is neutral."""
    if all(each["slider_strength"] == 1 for each in datasets):
        for each in datasets:
            del each["slider_strength"]


def _dropout(settings: Settings) -> None:
    """The rate of caption dropout; the run's stands above those of the datasets."""
    draft, key, ours = settings.draft, "train.prompt_dropout_prob", "caption_dropout_probability"
    if settings.number(key):
        for each in draft.datasets:
            each[ours] = number(settings.number(key))
    share_dropout(draft)
    if settings.has(key):
        settings.decide(key, "translated", ours=ours, text="")


def _put_regularisation(own: Settings, entries: Sequence[dict[str, JsonValue]]) -> None:
    """Mark the datasets of an entry that keeps the class; is_reg of one decides the target of all."""
    if not (own.flag("is_reg") or own.flag("prior_reg")):
        return
    config = own.draft.config
    is_data = not own.flag("prior_reg") or config.get("regularisation_target") == "data"
    config["regularisation_target"] = "data" if is_data else "base"
    for entry in entries:
        entry["is_regularisation_data"] = True
    for key in ("is_reg", "prior_reg"):
        if own.has(key):
            own.decide(key, "translated", ours="is_regularisation_data: true")


def _dataset(own: Settings, place: Place, *, trigger: str) -> None:
    draft = own.draft
    key = "folder_path" if own.has("folder_path") else "dataset_path"
    folder = place.path(own.text(key))
    entry: dict[str, JsonValue] = {"type": "local"}
    own.put(key, "instance_data_dir", folder, into=entry)
    own.put("num_repeats", "repeats", max(0, own.whole("num_repeats") - 1), into=entry)
    own.put("network_weight", "slider_strength", number(own.number("network_weight")), into=entry)
    entry["resolution_type"] = "pixel_area"
    square = own.flag("square_crop") or not own.flag("buckets")
    random = own.flag("random_crop")
    entry["crop"] = square or random
    if entry["crop"]:
        entry |= {
            "crop_aspect": "square" if square else "preserve",
            "crop_style": "random" if random else "center",
        }
    for each in ("buckets", "square_crop", "random_crop"):
        if own.has(each):
            own.decide(each, "translated", ours=f"crop: {str(entry['crop']).lower()}")
    _captions(own, entry, place, trigger=own.text("trigger_word") or trigger)
    rate = own.number("caption_dropout_rate")
    entry["caption_dropout_probability"] = number(rate)
    if own.has("caption_dropout_rate"):
        own.decide("caption_dropout_rate", "translated", ours=f"caption_dropout_probability: {rate:g}")
    own.decide(
        "bucket_tolerance",
        "translated",
        ours=f"aspect_bucket_alignment: {own.whole('bucket_tolerance')}",
        text="",
    )
    sizes = own.items("resolution")
    resolutions: list[JsonValue] = [number(float(str(size))) for size in sizes]
    identity = unique_id(Path(folder).name or "images", [str(each["id"]) for each in draft.datasets])
    resolution = resolutions[0] if len(resolutions) == 1 else resolutions
    draft.datasets.append({"id": identity, **entry, "resolution": resolution})
    text = "" if len(sizes) == 1 else f"{len(sizes)} datasets of all images."
    own.decide("resolution", "translated", ours=f"resolution: {', '.join(map(str, sizes))}", text=text)


def _captions(own: Settings, entry: dict[str, JsonValue], place: Place, *, trigger: str) -> None:
    suffix = f".{own.text('caption_ext').lstrip('.')}"
    images = place.images(str(entry["instance_data_dir"]), with_subfolders=True)
    has_text = images is None or any(image.with_suffix(suffix).is_file() for image in images)
    default = own.text("default_caption")
    files = "json" if suffix.lower() == ".json" else "textfile"
    entry |= {"caption_strategy": files, "caption_lines": "whole"}
    if suffix.lower() not in (*text_suffixes(), ".json"):
        own.decide(
            "caption_ext", "not translated", text=f"Files {suffix} are not read here: rename them to .txt."
        )
    else:
        own.decide("caption_ext", "translated", ours=f"caption_strategy: {files}", text="")
    if default and not (has_text and images is not None):
        entry |= {"instance_prompt": default}
        if not has_text:
            entry["caption_strategy"] = "instanceprompt"
        else:
            del entry["caption_strategy"]
    if own.has("default_caption"):
        own.skip("default_caption", outcome="approximate")
    if trigger:
        prompt = (
            f"{trigger} {default}".strip() if entry.get("caption_strategy") == "instanceprompt" else trigger
        )
        entry["instance_prompt"] = prompt
        if entry.get("caption_strategy") != "instanceprompt":
            entry |= {"prepend_instance_prompt": True, "caption_strategy": files}
    if own.has("trigger_word"):
        own.skip("trigger_word", outcome="approximate")
    _tags(own, entry, images, suffix=suffix)


def _tags(own: Settings, entry: dict[str, JsonValue], images: Sequence[Path] | None, *, suffix: str) -> None:
    tags = Tags(
        separator=",",
        num_kept=own.whole("keep_tokens"),
        shuffles=own.flag("shuffle_tokens"),
        dropout=own.number("token_dropout_rate"),
    )
    files = [image.with_suffix(suffix) for image in images or ()]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    names = {"shuffles": "shuffle_tokens", "num_kept": "keep_tokens", "dropout": "token_dropout_rate"}
    put_tags(tags, entry, captions=None if images is None else texts, at=lambda key: own, names=names)


def _output(settings: Settings, name: str, place: Place) -> None:
    path = place.path("/".join(filter(None, (settings.text("training_folder").rstrip("/"), name))))
    if path and not is_of_other_system(path):
        settings.put("training_folder", "output_dir", path)
    elif settings.has("training_folder"):
        text = "A path of Windows: the run's folder is output/ and the name of the configuration's folder."
        settings.decide("training_folder", "approximate", ours="output_dir: its default", text=text)
    if settings.has("save.dtype"):
        settings.skip("save.dtype", outcome="approximate")


def _samples(settings: Settings, place: Place | None) -> None:
    """Put the prompts; their control images begin at a place, or are left out without one."""
    draft = settings.draft
    given = settings.items("sample.prompts") + settings.items("sample.samples")
    trigger = settings.text("trigger_word")
    prompts = [prompt for item in given if (prompt := _prompt(item, trigger, place)).text]
    shared = {
        "width": settings.value("sample.width"),
        "height": settings.value("sample.height"),
        "seed": settings.value("sample.seed"),
        "steps": settings.value("sample.sample_steps"),
        "guidance": settings.value("sample.guidance_scale"),
        "negative": settings.text("sample.neg") if settings.flag("sample.neg") else None,
        "strength": settings.value("sample.network_multiplier"),
    }
    prompts = [
        replace(each, options={k: v for k, v in shared.items() if v is not None} | dict(each.options))
        for each in prompts
    ]
    if prompts:
        difference = put_prompts(draft, prompts, guidance_key="validation_guidance")
        for key in ("sample.prompts", "sample.samples"):
            if settings.has(key):
                settings.decide(
                    key,
                    "approximate" if difference else "translated",
                    ours=counted(len(prompts), "prompt"),
                    text=difference,
                )
    accumulation = settings.whole("train.gradient_accumulation_steps")
    every = settings.whole("sample.sample_every") // max(1, accumulation)
    settings.put("sample.sample_every", "validation_step_interval", every)
    if prompts:
        skips = settings.flag("train.skip_first_sample") and not settings.flag("train.force_first_sample")
        settings.put("train.skip_first_sample", "validation_on_startup", not skips, text="")
    for key in ("width", "height", "seed", "sample_steps", "guidance_scale", "neg", "network_multiplier"):
        if settings.has(f"sample.{key}"):
            settings.decide(f"sample.{key}", "translated", ours=settings.rows[f"sample.{key}"].ours, text="")
    if settings.flag("sample.walk_seed"):
        settings.skip("sample.walk_seed", outcome="approximate")


def _prompt(item: JsonValue, trigger: str, place: Place | None) -> SamplePrompt:
    if isinstance(item, dict):
        names = {
            "neg": "negative",
            "guidance_scale": "guidance",
            "sample_steps": "steps",
            "network_multiplier": "strength",
            **dict.fromkeys(IMAGES, "control"),
        }
        options = {
            names.get(key, key): value for key, value in item.items() if key != "prompt" and value is not None
        }
        images = () if place is None else prompt_images(item, place)
        return SamplePrompt(str(item.get("prompt", "")).replace("[trigger]", trigger), options, images)
    prompt = prompt_of_line(str(item or "").replace("[trigger]", trigger))
    image = prompt.options.get("control")
    return prompt if place is None or not image else replace(prompt, images=(place.path(str(image)),))
