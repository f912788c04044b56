"""kohya's sd-scripts: toml files, command lines and the graphical program's json files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import (
    arguments_of,
    fit_to_quantised,
    put_optimizer,
)
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.kohya_data import put_data
from simpletuner.helpers.configuration.migration.kohya_graphical import Graphical, decide_rest
from simpletuner.helpers.configuration.migration.kohya_network import put_network
from simpletuner.helpers.configuration.migration.noise import levels_of_scheme, put_offset_noise
from simpletuner.helpers.configuration.migration.paths import Place, is_of_other_system
from simpletuner.helpers.configuration.migration.prompts import SamplePrompt, prompts_of_text, put_prompts
from simpletuner.helpers.configuration.migration.reading import read_text
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.whole_models import (
    fit_to_whole_model,
    put_fused_backward_pass,
    put_weight_format,
)
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError

# Keys that mean nothing beside the values of others.
_DEPENDENT = (
    *("noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_discount"),
    *("ip_noise_gamma_random_strength", "huber_schedule", "huber_c", "huber_scale"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
)
# Keys of a run that no dataset file has.
_OF_A_RUN = (
    "pretrained_model_name_or_path",
    "network_module",
    "output_dir",
    "dataset_config",
    "learning_rate",
)


@dataclass(frozen=True, slots=True)
class KohyaRun:
    """The settings of one run, from whichever file."""

    script: str
    """Name of the training script, without .py."""
    values: Mapping[str, JsonValue]
    place: Place
    specs: Mapping[str, ModelSpec]
    graphical: Graphical | None = None
    """The json of the graphical program; model and images may be missing in it, for the user to supply."""


def flat(content: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The keys of a toml; its sections have no meaning."""
    values: dict[str, JsonValue] = {}
    for key, value in content.items():
        values |= value if isinstance(value, dict) else {key: value}
    return values


def is_dataset_file(content: Mapping[str, JsonValue]) -> bool:
    """Whether a toml holds datasets and no run."""
    return isinstance(content.get("datasets"), list) and not any(key in flat(content) for key in _OF_A_RUN)


def script_of(values: Mapping[str, JsonValue]) -> str:
    """The script that settings without a command line are for.

    Raises:
        ConfigError: They do not show it.
    """
    facts = load_table("kohya").facts
    module = str(values.get("network_module", ""))
    if module in facts["modules"]:
        return str(facts["modules"][module])
    for sign in facts["signs"]:
        if not is_off(values.get(sign["key"])):
            return str(sign["script"])
    model = Path(str(values.get("pretrained_model_name_or_path", ""))).name.lower()
    for name in facts["names"]:
        if name in model:
            return str(facts["names"][name])
    scripts = ", ".join(name for name, fact in facts["scripts"].items() if "refused" not in fact)
    raise ConfigError(
        "The settings do not say which of kohya's scripts they are for. Give the command with the file: "
        f'"SCRIPT.py --config_file FILE.toml", with one of {scripts} as SCRIPT.'
    )


def read_kohya(run: KohyaRun) -> Draft:
    """The configuration of a run of kohya's scripts.

    Raises:
        ConfigError: The run is of another kind or model family, or a value or file cannot be read.
    """
    table = load_table("kohya")
    known = table.facts["scripts"][run.script]
    if "refused" in known:
        raise ConfigError(f"{run.script}.py {known['refused']}")
    draft = Draft(table.program)
    family = known["model_family"]
    rows = table.rows("dataset") | table.rows("command")
    settings = Settings(run.values, rows, draft, family=family)
    if settings.flag("network_train_text_encoder_only"):
        raise settings.error(
            "network_train_text_encoder_only", "only adapters of the denoiser are trained here."
        )
    draft.config["model_family"] = family
    _model(settings, run, family)
    trains_all = bool(known.get("trains_all"))
    if not trains_all:
        put_network(settings, family, run.place)
        _text_encoders(settings)
    _optimizer(settings)
    _memory(settings, family, trains_all=trains_all)
    alignment = run.specs[family].minimum_alignment
    put_data(settings, run.place, is_preset=run.graphical is not None, alignment=alignment)
    _schedule(settings)
    _saving(settings, run.place)
    _noise(settings)
    _samples(settings, run)
    settings.finish()
    if trains_all:
        fit_to_whole_model(draft)
    if run.graphical is not None:
        decide_rest(run.graphical, draft)
    for key in table.facts["without_guidance"].get(str(draft.config.get("model_flavour")), ()):
        draft.withdraw(key, "This model has no guidance embedding.")
    fit_to_quantised(draft)
    return draft


def _model(settings: Settings, run: KohyaRun, family: str) -> None:
    key, draft = "pretrained_model_name_or_path", settings.draft
    spec = run.specs[family]
    path = run.place.path(settings.text(key))
    if not path and run.graphical is None:
        raise ConfigError(f"{key} is missing: this is no whole configuration of kohya's scripts.")
    if not path:
        text = f"Not in the preset: the repository of {spec.default_flavour} is used."
        settings.values[key] = spec.flavours[spec.default_flavour]
        settings.put(key, key, spec.flavours[spec.default_flavour], text=text)
    elif spec.denoiser_name == "transformer" and path.endswith((".safetensors", ".sft")):
        name = Path(path).name.lower()
        flavour = next((each for each in spec.flavours if each != spec.default_flavour and each in name), "")
        draft.config["model_flavour"] = flavour or spec.default_flavour
        text = f"The other parts come from the repository {spec.flavours[flavour or spec.default_flavour]}."
        settings.put(key, "pretrained_transformer_model_name_or_path", path, text=text)
    else:
        settings.put(key, key, path)
    for encoder in ("clip_l", "t5xxl"):
        if settings.has(encoder):
            settings.skip(encoder, outcome="approximate")
    for vae in ("vae", "ae"):
        if settings.has(vae) and settings.text(vae):
            settings.put(vae, "pretrained_vae_model_name_or_path", run.place.path(settings.text(vae)))


def _text_encoders(settings: Settings) -> None:
    only = settings.flag("network_train_unet_only") or settings.flag("cache_text_encoder_outputs")
    rates = [rate for rate in settings.items("text_encoder_lr") if not is_off(rate)]
    frozen = only or (settings.has("text_encoder_lr") and not rates)
    if frozen:
        settings.decide("network_train_unet_only", "translated", ours="the only way here", text="")
    else:
        settings.decide(
            "network_train_unet_only", "not translated", text=settings.rows["network_train_unet_only"].text
        )
    for key in ("text_encoder_lr", "learning_rate_te1", "learning_rate_te2"):
        if settings.has(key):
            outcome: Outcome = "no effect" if frozen else "not translated"
            settings.decide(key, outcome, text=settings.rows[key].text)


def _optimizer(settings: Settings) -> None:
    if not settings.has("optimizer_type"):
        for old, name in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
            if settings.flag(old):
                settings.values["optimizer_type"] = name
                settings.decide(old, "translated", ours=f"as optimizer_type {name}", text="")
    arguments = arguments_of(_words(settings.items("optimizer_args")))
    # Defaults of prodigyopt that differ from ours.
    prodigy = {"use_bias_correction": False, "safeguard_warmup": False}
    put_optimizer(
        settings, "optimizer_type", arguments, arguments_key="optimizer_args", defaults={"prodigy": prodigy}
    )
    rate = settings.number("unet_lr") or settings.number("learning_rate")
    key = "unet_lr" if settings.number("unet_lr") else "learning_rate"
    settings.put(key, "learning_rate", rate)
    other = "learning_rate" if key == "unet_lr" else "unet_lr"
    if settings.has(other):
        settings.decide(other, "no effect", text=f"{key} counts.")


def _words(items: list[JsonValue]) -> list[JsonValue]:
    """The items, each word by itself: the graphical program keeps all arguments in one text."""
    return [word for item in items for word in str(item).split()]


def _memory(settings: Settings, family: str, *, trains_all: bool) -> None:
    draft = settings.draft
    settings.put("gradient_checkpointing", "gradient_checkpointing", settings.flag("gradient_checkpointing"))
    if trains_all:
        put_weight_format(settings, "full_bf16", is_bf16=settings.flag("full_bf16"))
        accumulation = settings.whole("gradient_accumulation_steps", 1)
        put_fused_backward_pass(settings, "fused_backward_pass", accumulation=accumulation)
    elif settings.has("fused_backward_pass"):
        settings.decide("fused_backward_pass", "no effect", text="Of whole models.")
    for key in ("full_bf16", "full_fp16"):
        if settings.has(key):
            settings.skip(key, outcome="approximate")
    swaps = [
        key
        for key in ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap")
        if settings.flag(key)
    ]
    for key in swaps:
        settings.put(key, "enable_group_offload", True)
    if swaps and load_table("kohya").facts["denoisers_without_blocks"].count(family):
        draft.config["group_offload_type"] = "leaf_level"
    for key in ("fp8_base", "fp8_base_unet"):
        if settings.flag(key):
            settings.put(key, "base_model_precision", "fp8-torchao")


def _schedule(settings: Settings) -> None:
    """The keys of the learning-rate schedule, once the number of steps is known."""
    draft = settings.draft
    chosen = settings.text("lr_scheduler").lower()
    value = settings.value("lr_warmup_steps")
    steps = draft.length.steps if draft.length else draft.config.get("max_train_steps")
    if isinstance(value, float) and value != int(value):
        if isinstance(steps, int):
            text = f"{value:g} of {steps:,} steps."
            settings.put("lr_warmup_steps", "lr_warmup_steps", int(value * steps), text=text)
        else:
            text = "A share of a number of steps that is not known without the images: set lr_warmup_steps."
            settings.decide("lr_warmup_steps", "not translated", text=text)
    elif chosen == "constant":
        settings.decide("lr_warmup_steps", "no effect", text="constant has no warm-up.")
    else:
        settings.put("lr_warmup_steps", "lr_warmup_steps", settings.whole("lr_warmup_steps"))
    cycles = settings.number("lr_scheduler_num_cycles", 1.0)
    if settings.has("lr_scheduler_num_cycles") and chosen == "cosine_with_restarts" and cycles > 0:
        settings.put("lr_scheduler_num_cycles", "lr_num_cycles", cycles)
    if chosen == "polynomial":
        settings.put("lr_scheduler_power", "lr_power", settings.number("lr_scheduler_power", 1.0) or 1.0)
        draft.config["lr_end"] = min(1e-7, float(str(draft.config["learning_rate"])))
    for key in ("lr_scheduler_num_cycles", "lr_scheduler_power"):
        if settings.has(key):
            settings.decide(key, "no effect", text="Of another schedule.")


def _saving(settings: Settings, place: Place) -> None:
    draft = settings.draft
    folder, name = settings.text("output_dir"), settings.text("output_name")
    path = place.path("/".join(filter(None, (folder.rstrip("/\\"), name))))
    if path and not is_of_other_system(path):
        settings.put("output_dir" if folder else "output_name", "output_dir", path)
    elif path:
        text = "A path of Windows: the run's folder is output/ and the name of the configuration's folder."
        settings.decide("output_dir", "approximate", ours="output_dir: its default", text=text)
    settings.decide("output_name", "translated", ours="the name of the run's folder")
    suffix = settings.text("save_model_as")
    if suffix == "safetensors" and draft.config.get("lora_type") == "standard":
        settings.put("save_model_as", "lora_format", "comfyui")
    elif settings.has("save_model_as"):
        text = (
            "" if suffix == "safetensors" else "Only safetensors is written; simpletuner export converts it."
        )
        settings.decide("save_model_as", "approximate", ours="safetensors", text=text)
    if settings.has("save_precision"):
        settings.skip("save_precision", outcome="approximate")
    _interval(
        settings, ("save_every_n_epochs", "save_every_n_steps"), "checkpoint_step_interval", otherwise=0
    )
    limit, per_epoch = "checkpoints_total_limit", _steps_per_epoch(draft)
    if settings.flag("save_last_n_epochs"):
        every = max(1, settings.whole("save_every_n_epochs", 1))
        settings.put("save_last_n_epochs", limit, max(1, settings.whole("save_last_n_epochs") // every))
    elif settings.flag("save_last_n_steps") and settings.flag("save_every_n_steps"):
        number = settings.whole("save_last_n_steps") // max(1, settings.whole("save_every_n_steps"))
        settings.put("save_last_n_steps", limit, max(1, number))
    else:
        draft.config[limit] = 0
    if settings.flag("save_n_epoch_ratio"):
        if per_epoch and draft.length:
            every = max(1, draft.length.steps // per_epoch // settings.whole("save_n_epoch_ratio"))
            settings.put("save_n_epoch_ratio", "checkpoint_step_interval", every * per_epoch)
        else:
            settings.decide("save_n_epoch_ratio", "not translated", text="Set checkpoint_step_interval.")


def _steps_per_epoch(draft: Draft) -> int | None:
    return draft.length.steps_per_epoch if draft.length else None


def _interval(settings: Settings, keys: tuple[str, str], ours: str, *, otherwise: int) -> None:
    """An interval in epochs or steps as steps; epochs count first."""
    epochs, steps = keys
    per_epoch = _steps_per_epoch(settings.draft)
    if settings.flag(epochs) and per_epoch:
        number = settings.whole(epochs)
        text = f"{number} x {per_epoch:,} steps of an epoch."
        settings.put(epochs, ours, number * per_epoch, text=text)
    elif settings.flag(epochs):
        settings.put(epochs, ours.replace("_step_", "_epoch_"), settings.whole(epochs))
        settings.draft.config.setdefault(ours, 0)
    if settings.flag(steps) and ours not in settings.draft.config:
        settings.put(steps, ours, settings.whole(steps))
    settings.draft.config.setdefault(ours, otherwise)
    for key in keys:
        if settings.has(key):
            settings.skip(key, f"{epochs} counts.", outcome="no effect")


def _noise(settings: Settings) -> None:
    _noise_itself(settings)
    for key in ("min_timestep", "max_timestep"):
        if key in settings.rows and settings.has(key):
            settings.put(key, key, settings.whole(key))
    if settings.text("loss_type") in ("huber", "smooth_l1"):
        for key in ("huber_schedule", "huber_c"):
            if settings.has(key):
                settings.put(key, key, settings.value(key))
        settings.skip("huber_scale")
    if "timestep_sampling" in settings.rows:
        _noise_levels(settings)
    for key in _DEPENDENT:
        if key in settings.rows and settings.has(key):
            settings.decide(key, "no effect", text="What it belongs to is off.")


def _noise_itself(settings: Settings) -> None:
    iterations, discount = "multires_noise_iterations", "multires_noise_discount"
    if "noise_offset" in settings.rows and settings.has("noise_offset"):
        put_offset_noise(settings, "noise_offset")
    if iterations in settings.rows and settings.flag(iterations):
        settings.put(iterations, iterations, settings.whole(iterations))
        settings.put(discount, discount, settings.number(discount, 0.3))
    if settings.flag("ip_noise_gamma"):
        settings.put("ip_noise_gamma", "input_perturbation", settings.number("ip_noise_gamma"))
    for switch, key in (
        ("noise_offset", "noise_offset_random_strength"),
        ("noise_offset", "adaptive_noise_scale"),
        ("ip_noise_gamma", "ip_noise_gamma_random_strength"),
    ):
        if settings.has(key) and settings.flag(switch):
            settings.skip(key)


def _noise_levels(settings: Settings) -> None:
    draft, way = settings.draft, settings.text("timestep_sampling").lower()
    shift = settings.number("discrete_flow_shift")
    shifted = way in ("sigma", "shift")
    scheme = settings.text("weighting_scheme").lower() if way == "sigma" else ""
    levels = levels_of_scheme(
        scheme,
        mean=settings.number("logit_mean"),
        spread=settings.number("logit_std", 1.0),
        scale=settings.number("mode_scale", 1.29),
    )
    ways: dict[str, dict[str, JsonValue]] = {
        "sigma": {**(levels or {"flow_use_uniform_schedule": True}), "flow_schedule_shift": shift},
        "uniform": {"flow_use_uniform_schedule": True, "flow_schedule_shift": 0},
        "sigmoid": {"flow_schedule_shift": 0},
        "shift": {"flow_schedule_shift": shift},
        load_table("kohya").facts["shift_by_size"]: {"flow_schedule_auto_shift": True},
    }
    written = ways.get(way, {})
    draft.config.update(written)
    if written:
        settings.decide("timestep_sampling", "translated", ours=", ".join(written), text="")
    else:
        settings.decide(
            "timestep_sampling", "not translated", text="Not known here: the model's own shift is used."
        )
    for key in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale"):
        if settings.has(key) and way == "sigma" and not levels:
            settings.skip(key)
        elif settings.has(key) and scheme:
            settings.decide(key, "translated", ours=", ".join(levels), text="")
    if settings.has("discrete_flow_shift"):
        outcome: Outcome = "translated" if shifted else "no effect"
        settings.decide("discrete_flow_shift", outcome, ours="flow_schedule_shift", text="")
    if way not in ("sigma", "uniform"):
        settings.put("sigmoid_scale", "flow_sigmoid_scale", settings.number("sigmoid_scale"))
    if settings.text("model_prediction_type") == "raw":
        settings.decide("model_prediction_type", "translated", ours="the only way here", text="")
    else:
        text = settings.rows["model_prediction_type"].text
        settings.decide("model_prediction_type", "not translated", text=text)


def _samples(settings: Settings, run: KohyaRun) -> None:
    draft, key = settings.draft, "sample_prompts"
    given = settings.text(key)
    if not given:
        for each in ("sample_every_n_epochs", "sample_every_n_steps", "sample_sampler", "sample_at_first"):
            if settings.has(each):
                settings.decide(each, "no effect", text="There are no sample prompts.")
        return
    prompts = _prompts(given, run.place)
    if prompts:
        is_distilled = draft.config["model_family"] not in load_table("kohya").facts["two_pass_families"]
        difference = put_prompts(draft, prompts, guidance_key="validation_guidance")
        if is_distilled:
            draft.config["validation_guidance_real"] = 1.0
        settings.decide(
            key,
            "approximate" if difference else "translated",
            ours=f"{len(prompts)} prompts",
            text=difference,
        )
    else:
        settings.decide(
            key, "not translated", text="The file is not here, or not a text: set validation_prompt."
        )
        draft.to_do.append(f"Set validation_prompt or user_prompt_library: {given} cannot be read here.")
    _interval(
        settings, ("sample_every_n_epochs", "sample_every_n_steps"), "validation_step_interval", otherwise=0
    )
    row, found = settings.rows["sample_sampler"], None
    if draft.config["model_family"] in load_table("kohya").facts["two_pass_families"]:
        found = row.values.get(settings.text("sample_sampler").lower() or "ddim")
        if found is not None:
            settings.put("sample_sampler", "validation_noise_scheduler", found.ours)
    if settings.has("sample_sampler"):
        settings.decide("sample_sampler", "not translated", text=row.text)


def _prompts(given: str, place: Place) -> list[SamplePrompt]:
    path = Path(place.path(given))
    if path.is_file() and path.suffix.lower() == ".txt":
        return prompts_of_text(read_text(path))
    # The graphical program has the prompts themselves in its json.
    return prompts_of_text(given) if " " in given and not path.is_file() and path.suffix == "" else []
