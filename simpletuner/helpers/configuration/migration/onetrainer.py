"""OneTrainer: its json files, with concepts and samples in them or beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import (
    expanded,
    fit_to_quantised,
    number,
    put_lora,
    put_lycoris,
    put_optimizer,
)
from simpletuner.helpers.configuration.migration.averages import OFF, put_ema
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.noise import put_offset_noise
from simpletuner.helpers.configuration.migration.onetrainer_data import list_of, put_concepts
from simpletuner.helpers.configuration.migration.paths import Place, is_of_other_system
from simpletuner.helpers.configuration.migration.prompts import SamplePrompt, put_prompts
from simpletuner.helpers.configuration.migration.reading import flattened
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.whole_models import (
    fit_to_whole_model,
    put_fused_backward_pass,
    put_layer_filter,
    put_weight_format,
)
from simpletuner.helpers.configuration.schema.base import NUM_TIMESTEPS
from simpletuner.helpers.configuration.schema.noise import MODE_SCALES
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae", "quantization", "cloud", "secrets")
_ALGORITHMS = {"LOHA": "loha", "LOKR": "lokr"}
_LOKR = {
    "lokr_decompose_factor": "factor",
    "lokr_decompose_both": "decompose_both",
    "lokr_use_tucker": "use_tucker",
    "lokr_weight_decompose": "weight_decompose",
    "lokr_full_matrix": "full_matrix",
}


def is_one_trainer(content: Mapping[str, JsonValue]) -> bool:
    """Whether an object is a configuration of OneTrainer."""
    return "training_method" in content and "model_type" in content


def read_one_trainer(content: Mapping[str, JsonValue], place: Place, specs: Mapping[str, ModelSpec]) -> Draft:
    """The configuration of a run of OneTrainer.

    Raises:
        ConfigError: The run is of another kind or model family, or its concepts are missing.
    """
    table = load_table("onetrainer")
    facts = table.facts
    fact = facts["model_types"].get(str(content["model_type"]))
    if fact is None or "refused" in fact:
        reason = facts["other_family"] if fact is None else fact["refused"]
        raise ConfigError(f"model_type: {content['model_type']}: {reason}")
    reason = facts["methods"].get(str(content["training_method"]), "is not known here. Give LORA.")
    if reason:
        raise ConfigError(f"training_method: {content['training_method']}: {reason}")
    draft = Draft(table.program)
    draft.config.update(fact)
    family = str(fact["model_family"])
    settings = Settings(_flat(content), table.rows("run"), draft, family=family)
    trains_all = content["training_method"] == "FINE_TUNE"
    ours = "model_type: full" if trains_all else "lora_type"
    settings.decide("training_method", "translated", ours=ours, text="")
    settings.decide("model_type", "translated", ours=f"model_family: {family}", text="")
    _model(settings, specs[family], place)
    if trains_all:
        _layer_filter(settings, family)
    else:
        _network(settings, family, place)
    _precision(settings, family)
    _training(settings, trains_all=trains_all)
    put_concepts(settings, place)
    _schedule(settings)
    _noise(settings, family)
    _saving(settings, place)
    _samples(settings, place)
    for key in [
        each for each in settings.values if each.partition(".")[0] in _PARTS and each not in settings.rows
    ]:
        settings.decide(key, "no effect", text=settings.rows["unet.*"].text)
    settings.finish()
    if trains_all:
        fit_to_whole_model(draft)
    fit_to_quantised(draft)
    return draft


def _flat(content: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Keys with dots; concepts, samples and what belongs to the program itself stay whole."""
    values: dict[str, JsonValue] = {}
    for key, value in content.items():
        nested = isinstance(value, dict) and key in ("optimizer", *_PARTS[:5])
        values |= dict(flattened(value, key)) if nested else {key: value}
    return values


def _model(settings: Settings, spec: ModelSpec, place: Place) -> None:
    draft, key = settings.draft, "base_model_name"
    path = place.path(settings.text(key))
    flavour = next((name for name, repository in spec.flavours.items() if repository == path), None)
    if flavour is not None:
        draft.config["model_flavour"] = flavour
    if not path:
        draft.config["model_flavour"] = spec.default_flavour
    single = path.endswith(".safetensors") and spec.denoiser_name == "transformer"
    if path:
        part = "transformer_" if single else ""
        settings.put(key, f"pretrained_{part}model_name_or_path", path)
    for part in ("transformer", "unet", "vae"):
        name = f"{part}.model_name"
        if settings.text(name) and part in ("vae", spec.denoiser_name):
            settings.put(name, f"pretrained_{part}_model_name_or_path", place.path(settings.text(name)))
        elif settings.has(name):
            settings.decide(name, "no effect", text="Not given, or of another kind of model.")
    _trained_parts(settings, spec)


def _trained_parts(settings: Settings, spec: ModelSpec) -> None:
    for part in ("unet", "transformer"):
        key = f"{part}.train"
        if part == spec.denoiser_name and not settings.flag(key):
            raise settings.error(key, "only adapters of the denoiser are trained here.")
        if settings.has(key):
            settings.decide(key, "translated", ours="the only way here", text="")
    for index in range(1, spec.num_text_encoders + 1):
        key = "text_encoder.train" if index == 1 else f"text_encoder_{index}.train"
        if settings.flag(key):
            settings.decide(key, "not translated", text=settings.rows["text_encoder.train"].text)
    for key in ("text_encoder.train", "text_encoder_2.train"):
        if settings.has(key):
            settings.decide(key, "no effect", text="Off, as here, or the model has no such part.")


def _network(settings: Settings, family: str, place: Place) -> None:
    facts, draft = load_table("onetrainer").facts, settings.draft
    kind = settings.text("peft_type").upper()
    rank, alpha, dropout = (
        settings.whole("lora_rank"),
        settings.number("lora_alpha"),
        settings.number("dropout_probability"),
    )
    if kind not in ("LORA", *_ALGORITHMS):
        raise settings.error("peft_type", "is not supported here. Known are LORA, LOHA and LOKR.")
    preset_name = settings.text("layer_filter_preset")
    filters = settings.text("layer_filter") or facts["layer_presets"][family].get(preset_name, "")
    names = facts["known_targets"].get(family, {}).get(filters)
    decomposes = settings.flag("lora_decompose")
    if kind == "LORA" and names and not settings.flag("layer_filter_regex"):
        put_lora(
            draft, rank=rank, alpha=alpha, targets=expanded(names, facts["single_blocks"]), dropout=dropout
        )
        if decomposes:
            draft.config["use_dora"] = True
        where = "peft_lora_target_modules"
    else:
        parts = [part.strip() for part in filters.split(",")]
        patterns = [
            part if settings.flag("layer_filter_regex") else part.replace(".", r"\.") for part in parts
        ]
        arguments: dict[str, JsonValue] = {"weight_decompose": True} if decomposes else {}
        if kind == "LOKR":
            arguments = {
                ours: settings.value(theirs) for theirs, ours in _LOKR.items() if settings.has(theirs)
            }
            rank = settings.whole("lokr_dim", 16)
        preset = {"target_name": [f".*{pattern}.*" if pattern else ".*" for pattern in patterns]}
        algo = _ALGORITHMS.get(kind, "lora")
        put_lycoris(draft, algo=algo, rank=rank, alpha=alpha, preset=preset, arguments=arguments)
        where = "apply_preset of the lycoris json"
    for key in ("layer_filter", "layer_filter_preset", "layer_filter_regex"):
        if settings.has(key):
            settings.decide(key, "translated", ours=where, text="")
    _network_rest(settings, kind=kind, rank=rank, place=place)


def _layer_filter(settings: Settings, family: str) -> None:
    """The weights of a whole model that are trained."""
    presets = load_table("onetrainer").facts["layer_presets"][family]
    filters = settings.text("layer_filter") or presets.get(settings.text("layer_filter_preset"), "")
    parts = [part.strip() for part in filters.split(",")]
    is_regex = settings.flag("layer_filter_regex")
    put_layer_filter(
        settings, "layer_filter", [part if is_regex else part.replace(".", r"\.") for part in parts]
    )
    for key in ("layer_filter_preset", "layer_filter_regex"):
        if settings.has(key):
            settings.decide(key, "translated", ours="layer_filter", text="")


def _network_rest(settings: Settings, *, kind: str, rank: int, place: Place) -> None:
    draft = settings.draft
    settings.decide("peft_type", "translated", ours=f"lora_type: {draft.config['lora_type']}", text="")
    if kind != "LOKR" or settings.has("lora_rank"):
        settings.decide(
            "lora_rank", "translated" if kind != "LOKR" else "no effect", ours=f"rank {rank}", text=""
        )
    settings.decide("lora_alpha", "translated", ours=f"alpha {settings.number('lora_alpha'):g}", text="")
    outcome: Outcome
    for key in (*_LOKR, "lokr_dim"):
        if settings.has(key):
            outcome = "translated" if kind == "LOKR" else "no effect"
            settings.decide(key, outcome, ours=_LOKR.get(key, "linear_dim"), text="")
    if settings.has("lora_decompose"):
        outcome = "translated" if settings.flag("lora_decompose") else "no effect"
        ours = "use_dora" if draft.lycoris is None else "weight_decompose"
        settings.decide("lora_decompose", outcome, ours=ours, text="")
    if settings.flag("dropout_probability") and draft.lycoris is not None:
        settings.decide(
            "dropout_probability", "not translated", text="LyCORIS has rank_dropout and module_dropout."
        )
    elif settings.has("dropout_probability"):
        settings.decide("dropout_probability", "translated", ours="lora_dropout", text="")
    if settings.text("lora_model_name"):
        settings.put("lora_model_name", "init_lora", place.path(settings.text("lora_model_name")))
    if settings.has("lora_model_name"):
        settings.decide("lora_model_name", "no effect", text="Not given.")
    if settings.has("lora_weight_dtype"):
        settings.skip("lora_weight_dtype", outcome="approximate")


def _precision(settings: Settings, family: str) -> None:
    facts, draft = load_table("onetrainer").facts, settings.draft
    parts = (
        (("unet", "transformer"), "base_model_precision"),
        (("text_encoder",), "text_encoder_1_precision"),
        (("text_encoder_2",), "text_encoder_2_precision"),
    )
    num_encoders = 1 if family not in facts["two_encoders"] else 2
    for names, ours in parts:
        for name in names:
            key = f"{name}.weight_dtype"
            found = facts["quantised"].get(settings.text(key))
            exists = name not in ("text_encoder_2",) or num_encoders > 1
            if found and exists:
                settings.put(key, ours, found, outcome="approximate")
            elif settings.has(key):
                settings.decide(key, "no effect", text="The format of mixed_precision, as here.")
    for key in ("layer_offload_fraction", "unet.offload_fraction", "transformer.offload_fraction"):
        if settings.flag(key):
            settings.put(key, "enable_group_offload", True)
            if family in facts["denoisers_without_blocks"]:
                draft.config["group_offload_type"] = "leaf_level"
        elif settings.has(key):
            settings.decide(key, "no effect", text="Off, as here.")
    row = settings.rows["gradient_checkpointing"]
    found = row.values.get(settings.text("gradient_checkpointing").lower())
    on = found is None or bool(found.ours)
    settings.put("gradient_checkpointing", "gradient_checkpointing", on, text=found.text if found else "")


def _training(settings: Settings, *, trains_all: bool) -> None:
    arguments = {
        key.partition(".")[2]: value for key, value in settings.values.items() if key.startswith("optimizer.")
    }
    arguments.pop("optimizer", None)
    if trains_all and "fused_back_pass" in arguments:
        arguments.pop("fused_back_pass")
        accumulation = settings.whole("gradient_accumulation_steps", 1)
        put_fused_backward_pass(settings, "optimizer.fused_back_pass", accumulation=accumulation)
    if trains_all and "stochastic_rounding" in arguments:
        arguments.pop("stochastic_rounding")
        put_weight_format(settings, "optimizer.stochastic_rounding", is_bf16=True)
    for name in arguments:
        settings.decide(
            f"optimizer.{name}", "translated", ours="optimizer_config", text=settings.rows["optimizer.*"].text
        )
    given = {
        name: value for name, value in arguments.items() if name in ("beta1", "beta2") or not is_off(value)
    }
    prodigy = {"use_bias_correction": False, "safeguard_warmup": False, "weight_decay": 0.0}
    put_optimizer(
        settings, "optimizer.optimizer", given, arguments_key="optimizer", defaults={"prodigy": prodigy}
    )
    draft = settings.draft
    _average(settings)
    part = next(
        (
            f"{name}.learning_rate"
            for name in ("unet", "transformer")
            if settings.number(f"{name}.learning_rate")
        ),
        "",
    )
    key = part or "learning_rate"
    rate = settings.number(key)
    scaler = settings.text("learning_rate_scaler").upper()
    batch, accumulation = settings.whole("batch_size", 1), settings.whole("gradient_accumulation_steps", 1)
    factors = {
        "BATCH": batch,
        "GLOBAL_BATCH": batch,
        "GRADIENT_ACCUMULATION": accumulation,
        "BOTH": batch * accumulation,
        "GLOBAL_BOTH": batch * accumulation,
    }
    factor = math.sqrt(factors.get(scaler, 1))
    settings.put(
        key,
        "learning_rate",
        rate * factor,
        text="" if factor == 1 else f"{rate:g} x {factor:.3g}, by learning_rate_scaler.",
    )
    if settings.has("learning_rate_scaler"):
        settings.decide("learning_rate_scaler", "translated", ours="learning_rate", text="")
    for each in ("learning_rate", "unet.learning_rate", "transformer.learning_rate"):
        if settings.has(each):
            settings.decide(each, "no effect", text=f"{key} counts.")
    dropout = [settings.number(f"{name}.dropout_probability") for name in ("text_encoder", "text_encoder_2")]
    draft.config["caption_dropout_probability"] = number(dropout[0])
    for name, value in zip(("text_encoder", "text_encoder_2"), dropout, strict=True):
        if settings.has(f"{name}.dropout_probability"):
            same = value == dropout[0]
            settings.decide(
                f"{name}.dropout_probability",
                "translated" if same else "not translated",
                ours=f"caption_dropout_probability: {value:g}",
                text="",
            )


def _average(settings: Settings) -> None:
    """EMA: its images beside those of the trained weights, or alone."""
    plain_too = settings.flag("non_ema_sampling")
    images = "comparison" if plain_too else "ema_only"
    numbers = {"ema_decay": "ema_decay", "ema_update_step_interval": "ema_update_interval"}
    is_kept = put_ema(settings, "ema", numbers=numbers, images=images)
    if is_kept and settings.text("ema").upper() == "GPU":
        settings.draft.config["ema_device"] = "accelerator"
    if settings.has("non_ema_sampling"):
        outcome: Outcome = "translated" if is_kept else "no effect"
        text = "" if is_kept else OFF
        settings.decide("non_ema_sampling", outcome, ours=f'ema_validation: "{images}"', text=text)


def _schedule(settings: Settings) -> None:
    draft = settings.draft
    row = settings.rows["learning_rate_scheduler"]
    found = row.values.get(settings.text("learning_rate_scheduler").lower())
    chosen = str(found.ours) if found else "constant_with_warmup"
    outcome, text = (
        (found.outcome, found.text) if found else ("not translated", "constant_with_warmup is used.")
    )
    settings.put("learning_rate_scheduler", "lr_scheduler", chosen, outcome=outcome, text=text)
    accumulation, warmup = (
        max(1, settings.whole("gradient_accumulation_steps", 1)),
        settings.number("learning_rate_warmup_steps"),
    )
    key = "learning_rate_warmup_steps"
    if warmup > 1:
        note = "" if accumulation == 1 else f"{warmup:g} batches, {accumulation} to a step."
        settings.put(key, "lr_warmup_steps", int(warmup / accumulation), text=note)
    elif warmup > 0 and draft.length:
        settings.put(
            key,
            "lr_warmup_steps",
            int(warmup * draft.length.steps),
            text=f"{warmup:g} of {draft.length.steps:,} steps.",
        )
    elif warmup > 0:
        settings.decide(
            key, "not translated", text="A share of a number of steps that is not known without the images."
        )
    else:
        settings.put(key, "lr_warmup_steps", 0, text="")
    if settings.has("learning_rate_cycles"):
        if chosen in ("cosine_with_restarts", "sine") and settings.number("learning_rate_cycles") > 0:
            settings.put("learning_rate_cycles", "lr_num_cycles", settings.number("learning_rate_cycles"))
        settings.decide("learning_rate_cycles", "no effect", text="Of another schedule.")
    if settings.has("learning_rate_min_factor"):
        end = settings.number("learning_rate_min_factor") * float(str(draft.config["learning_rate"]))
        settings.put("learning_rate_min_factor", "lr_end", end, text="A share of the learning rate.")


def _loss_weights(settings: Settings, *, is_flow: bool) -> None:
    function = settings.text("loss_weight_fn").upper()
    if function == "MIN_SNR_GAMMA" and not is_flow:
        settings.put("loss_weight_strength", "snr_gamma", settings.number("loss_weight_strength"))
        settings.decide("loss_weight_fn", "translated", ours="snr_gamma", text="")
    elif function == "DEBIASED_ESTIMATION" and not is_flow:
        is_epsilon = not settings.flag("force_v_prediction")
        text = "" if is_epsilon else "1 / (SNR + 1) here, the root of that in OneTrainer."
        outcome: Outcome = "translated" if is_epsilon else "approximate"
        settings.put("loss_weight_fn", "debiased_estimation_loss", True, outcome=outcome, text=text)
    elif settings.has("loss_weight_fn") and function != "CONSTANT":
        settings.decide(
            "loss_weight_fn", "not translated", text="All samples weigh the same; the result differs."
        )
    for key in ("loss_weight_fn", "loss_weight_strength"):
        if settings.has(key):
            settings.decide(key, "no effect", text="Every sample weighs the same, as here.")


def _noise(settings: Settings, family: str) -> None:
    draft, is_flow = settings.draft, family in load_table("onetrainer").facts["flow_families"]
    _loss_weights(settings, is_flow=is_flow)
    if settings.has("offset_noise_weight"):
        if is_flow:
            settings.skip("offset_noise_weight")
        else:
            put_offset_noise(settings, "offset_noise_weight")
    _timestep_range(settings, is_flow=is_flow)
    keys = (
        "timestep_distribution",
        "noising_weight",
        "noising_bias",
        "timestep_shift",
        "dynamic_timestep_shifting",
    )
    if is_flow:
        outcome, text = _flow(settings)
    else:
        uniform = settings.text("timestep_distribution").upper() == "UNIFORM"
        outcome, text = (
            ("translated", "")
            if uniform
            else ("not translated", "Timesteps are uniform; the result differs.")
        )
    for key in keys:
        if settings.has(key) or key == keys[0]:
            settings.decide(
                key,
                outcome,
                ours=", ".join(each for each in draft.config if each.startswith("flow_"))
                or "uniform timesteps",
                text=text,
            )


def _timestep_range(settings: Settings, *, is_flow: bool) -> None:
    is_shifted = settings.flag("dynamic_timestep_shifting") or settings.number("timestep_shift", 1.0) != 1
    for key, ours in (("min_noising_strength", "min_timestep"), ("max_noising_strength", "max_timestep")):
        row = settings.rows[key]
        if not settings.has(key) or row.is_noop(settings.value(key)):
            continue
        is_exact = not (is_flow and is_shifted)
        settings.put(
            key,
            ours,
            int(NUM_TIMESTEPS * settings.number(key)),
            outcome="translated" if is_exact else "approximate",
            text="" if is_exact else row.text,
        )


def _flow(settings: Settings) -> tuple[Outcome, str]:
    """Write the distribution of noise levels; returns the outcome and what differs."""
    draft, way = settings.draft, settings.text("timestep_distribution").upper()
    weight, bias = settings.number("noising_weight"), settings.number("noising_bias")
    if settings.flag("dynamic_timestep_shifting"):
        draft.config["flow_schedule_auto_shift"] = True
    else:
        draft.config["flow_schedule_shift"] = number(settings.number("timestep_shift"))
    if way == "UNIFORM":
        draft.config["flow_use_uniform_schedule"] = True
    elif way in ("LOGIT_NORMAL", "SIGMOID"):
        draft.config["flow_sigmoid_scale"] = number(weight + 1 if way == "LOGIT_NORMAL" else 1.0)
        if way == "SIGMOID":
            return (
                "approximate",
                "The sigmoid of a normal number here, a sigmoid as the density in OneTrainer.",
            )
        if bias:
            draft.config["flow_sigmoid_mean"] = number(bias)
    elif way == "HEAVY_TAIL" and MODE_SCALES[0] <= weight <= MODE_SCALES[1]:
        draft.config.update({"flow_use_mode_schedule": True, "flow_mode_schedule_scale": number(weight)})
    elif way == "BETA":
        draft.config.update(
            {
                "flow_use_beta_schedule": True,
                "flow_beta_schedule_alpha": max(weight, 1e-4),
                "flow_beta_schedule_beta": max(bias, 1e-4),
            }
        )
    else:
        draft.config["flow_use_uniform_schedule"] = True
        return "not translated", "Noise levels are uniform; the result differs."
    return "translated", ""


def _interval(settings: Settings, key: str, unit_key: str, *, ours: str, default: str) -> bool:
    """An interval in epochs or steps; returns whether it was written."""
    draft, unit = settings.draft, (settings.text(unit_key) or default).upper()
    every, written = settings.whole(key), False
    accumulation = max(1, settings.whole("gradient_accumulation_steps", 1))
    if unit == "STEP" and every:
        settings.put(key, ours, max(1, every // accumulation))
        written = True
    elif unit == "EPOCH" and every and draft.length and draft.length.steps_per_epoch:
        per_epoch = draft.length.steps_per_epoch
        settings.put(key, ours, every * per_epoch, text=f"{every} x {per_epoch:,} steps of an epoch.")
        written = True
    elif unit in ("NEVER", "ALWAYS") or not every:
        settings.decide(key, "no effect", text="Off.")
    else:
        settings.decide(key, "not translated", text=f"Set {ours}: intervals are in steps here.")
    if settings.has(unit_key):
        settings.decide(unit_key, "translated" if written else "no effect", ours=ours, text="")
    return written


def _saving(settings: Settings, place: Place) -> None:
    draft, key = settings.draft, "output_model_destination"
    path = place.path(settings.text(key)).removesuffix(".safetensors")
    if path and not is_of_other_system(path):
        settings.put(key, "output_dir", path)
    elif path:
        settings.decide(key, "approximate", ours="output_dir: its default", text="A path of Windows.")
    wants_kohya = settings.text("output_model_format").upper() != "DIFFUSERS_LORA"
    if wants_kohya and draft.config.get("lora_type") == "standard" and not draft.config.get("use_dora"):
        settings.put("output_model_format", "lora_format", "comfyui")
    elif settings.has("output_model_format"):
        settings.decide("output_model_format", "translated", ours="safetensors", text="")
    saves = _interval(
        settings, "save_every", "save_every_unit", ours="checkpoint_step_interval", default="NEVER"
    )
    if not saves:
        _interval(
            settings, "backup_after", "backup_after_unit", ours="checkpoint_step_interval", default="MINUTE"
        )


def _samples(settings: Settings, place: Place) -> None:
    samples = settings.value("samples")
    if not isinstance(samples, list) or not samples:
        samples = list_of(settings, "sample_definition_file_name", place)
    names: dict[str, Any] = {
        "diffusion_steps": "steps",
        "cfg_scale": "guidance",
        "negative_prompt": "negative",
    }
    prompts = [
        SamplePrompt(
            str(each.get("prompt", "")),
            {
                names.get(key, key): each[key]
                for key in ("width", "height", "seed", "diffusion_steps", "cfg_scale", "negative_prompt")
                if key in each
            },
        )
        for each in samples
        if isinstance(each, dict) and not is_off(each.get("enabled", True)) and each.get("prompt")
    ]
    difference = put_prompts(settings.draft, prompts, guidance_key="validation_guidance") if prompts else ""
    for key in ("samples", "sample_definition_file_name"):
        if settings.has(key):
            outcome: Outcome = "no effect" if not prompts else "approximate" if difference else "translated"
            text = difference or ("" if prompts else "No prompt is in it, or the file is not here.")
            settings.decide(key, outcome, ours=counted(len(prompts), "prompt"), text=text)
    if prompts:
        _interval(
            settings, "sample_after", "sample_after_unit", ours="validation_step_interval", default="MINUTE"
        )
    for key in ("sample_after", "sample_after_unit"):
        if settings.has(key):
            settings.decide(key, "no effect", text="There are no prompts.")
