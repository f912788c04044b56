"""Reads the lycoris json as a LycorisConfig."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from pydantic import JsonValue

from simpletuner.helpers.choices.algorithms import (
    ALGORITHMS,
    ARGUMENTS,
    DROPOUTS,
    argument_aliases,
    idle_options,
)
from simpletuner.helpers.choices.precisions import PRECISIONS
from simpletuner.helpers.configuration.loading.building import Source, build
from simpletuner.helpers.configuration.loading.translation import refusal
from simpletuner.helpers.configuration.schema.lycoris import (
    COMPUTED_FIELDS,
    TLORA_FIELDS,
    LycorisConfig,
    TargetPreset,
    algorithm_arguments,
    layer_aliases,
)
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Decision
from simpletuner.helpers.configuration.text.problems import shown, unknown_key

FIELDS = frozenset(LycorisConfig.model_fields) - COMPUTED_FIELDS
MAPS = ("module_algo_map", "name_algo_map")
_PLACEHOLDERS = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 1 << 20, "linear_alpha": 1.0}
_TEXTS = "apply_preset"
"""The key with texts, in which a variable of the environment may be a secret."""
FULL_DIMENSION = 10_000
"""A rank above that of every layer: LoKr then splits no factor."""
_LAYER_KEYS = frozenset({"algo", "dim", "alpha"})
_SCHEDULE_KEYS = frozenset({"tlora_min_rank", "tlora_alpha"})
"""Keys of the rank schedule that an entry of a map may have."""
_INIT_KEYS = frozenset({"tlora_init", "sig_type", "use_data_init"})
"""Keys of T-LoRA's initialisation."""
_INIT_OF_DATA = {True: "weight", False: "random"}


def read_lycoris(values: JsonValue, source: Source, *, raw: JsonValue) -> LycorisConfig | None:
    """Check a lycoris json; returns None if errors prevent building the LycorisConfig.

    Args:
        values: The json with the values of environment variables.
        source: Origin of the json.
        raw: The json as written.
    """
    if not isinstance(values, dict) or not isinstance(raw, dict):
        source.add("", "must hold an object, {...}.")
        return None
    stored = {key: raw[key] if key.removeprefix("--") == _TEXTS else value for key, value in values.items()}
    values = {key.removeprefix("--"): value for key, value in values.items() if value is not None}
    algorithms = _algorithms(values)
    arguments, fields = _split(values, source, algorithms)
    _check_preset(fields.get("apply_preset"), source, algo=values.get("algo"))
    if "tlora" in algorithms:
        fields = _with_init(fields, source)
    elif algorithms:
        scheduled = any(ALGORITHMS[algo].has_rank_schedule for algo in algorithms)
        idle = _INIT_KEYS if scheduled else frozenset(TLORA_FIELDS)
        fields = _without(idle, fields, source, algo=values.get("algo"))
    extra = build(algorithm_arguments(), arguments, source)
    built = build(LycorisConfig, fields, source, placeholders=_PLACEHOLDERS)
    if built.section is None or built.invalid_keys or extra.section is None or extra.invalid_keys:
        return None
    # A dropout of zero is the absence of dropout.
    given = {
        key: value for key, value in extra.section if value is not None and (key not in DROPOUTS or value)
    }
    config = built.section.model_copy(update={"extra": given, "raw": stored})
    for key, text in (_idle(config) | dict(_unfit_schedules(config))).items():
        source.add(key, text)
    _check_multiplier(config, source, algorithms)
    return config


def complete_lycoris(values: JsonValue, *, precision: str) -> tuple[dict[str, JsonValue], list[Decision]]:
    """What a lycoris json of SimpleTuner leaves to LyCORIS and must be said here, with the reasons.

    Args:
        values: The json.
        precision: base_model_precision, a name in PRECISIONS.
    """
    if not isinstance(values, dict):
        return {}, []
    algorithms = _algorithms(values)
    records = [ALGORITHMS[algo] for algo in algorithms]
    added: dict[str, JsonValue] = {}
    decisions: list[Decision] = []
    if values.get("algo") == "lokr" and values.get("linear_dim") is None:
        added["linear_dim"] = FULL_DIMENSION
        text = "Left out: the full dimension, as with full_matrix."
        decisions.append(Decision("linear_dim", None, "translated", f"linear_dim: {FULL_DIMENSION}", text))
    needs_bypass = (
        bool(records)
        and PRECISIONS[precision].needs_bypass_mode
        and values.get("bypass_mode") is None
        and all("bypass_mode" in record.arguments and not record.needs_dense_weight for record in records)
    )
    if needs_bypass and is_off(values.get("weight_decompose")) and is_off(values.get("dora_wd")):
        added["bypass_mode"] = True
        text = f"Left out: {precision} weights cannot be added to."
        decisions.append(Decision("bypass_mode", None, "translated", "bypass_mode: true", text))
    return added, decisions


def _idle(config: LycorisConfig) -> dict[str, str]:
    """Key -> problem of each option that has no effect beside the other options of its layers."""
    layer = {"algo": config.algo, **config.extra}
    problems = dict(_idle_beside(layer))
    preset = config.apply_preset
    maps = {"module_algo_map": preset.module_algo_map, "name_algo_map": preset.name_algo_map}
    entries = (
        (f"apply_preset.{name}.{key}", entry) for name, each in maps.items() for key, entry in each.items()
    )
    for place, entry in entries:
        own = {key: value for key, value in entry if value is not None}
        found = dict(_idle_beside(layer | own)).items() - problems.items()  # the rest is inherited
        problems |= {f"{place}.{key}": text for key, text in found}
    return problems


def _unfit_schedules(config: LycorisConfig) -> Iterator[tuple[str, str]]:
    """(Key, problem) of each entry whose own values do not fit its rank or the adapter's schedule."""
    preset = config.apply_preset
    for name in MAPS:
        for target, entry in getattr(preset, name).items():
            rank, place = entry.dim or config.linear_dim, f"apply_preset.{name}.{target}"
            if entry.tlora_min_rank is not None and entry.tlora_min_rank > rank:
                text = f"{entry.tlora_min_rank} is above the rank of these layers, {rank}. Lower it."
                yield f"{place}.tlora_min_rank", text
            if entry.tlora_alpha not in (None, 1.0) and config.tlora_schedule in ("cosine", "linear"):
                text = f"has no meaning with tlora_schedule {config.tlora_schedule}. Omit it."
                yield f"{place}.tlora_alpha", text


def _idle_beside(layer: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    algo = str(layer["algo"])
    taken = ALGORITHMS[algo].arguments
    return idle_options(algo, {key: value for key, value in layer.items() if key in taken})


def _check_multiplier(config: LycorisConfig, source: Source, algorithms: Iterable[str]) -> None:
    """Refuse a multiplier that the adapter file could not carry."""
    if config.multiplier == 1:
        return
    options = [config.extra, *map(dict, config.apply_preset.entries)]
    fixed = sorted(name for name in algorithms if not ALGORITHMS[name].takes_multiplier)
    fixed += ["weight_decompose"] if any(each.get("weight_decompose") for each in options) else []
    if fixed:
        source.add(
            "multiplier",
            f"{config.multiplier:g} cannot be stored in the file of {', '.join(fixed)}, so programs would "
            "apply it at 1. Set it to 1.",
        )


def _algorithms(values: Mapping[str, JsonValue]) -> frozenset[str]:
    """Every known algorithm of the adapter and of single layers; empty if the adapter's is unknown."""
    preset = values.get("apply_preset")
    maps = [preset.get(name) for name in MAPS] if isinstance(preset, dict) else []
    entries = [
        entry for each in maps if isinstance(each, dict) for entry in each.values() if isinstance(entry, dict)
    ]
    named = [values.get("algo"), *(entry["algo"] for entry in entries if "algo" in entry)]
    known = {algo for algo in named if isinstance(algo, str) and algo in ALGORITHMS}
    main = values.get("algo")
    return frozenset(known) if isinstance(main, str) and main in known else frozenset()


def _takes(algorithms: Iterable[str]) -> frozenset[str]:
    taken = [ALGORITHMS[algo].arguments for algo in algorithms]
    return frozenset().union(*taken) if taken else frozenset(ARGUMENTS)


def _split(
    values: Mapping[str, JsonValue], source: Source, algorithms: frozenset[str]
) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """(algorithm arguments, fields of LycorisConfig); notes every other key."""
    arguments: dict[str, JsonValue] = {}
    fields: dict[str, JsonValue] = {}
    aliases = argument_aliases()
    known = {*FIELDS, "use_data_init", *_takes(algorithms), *aliases}
    for key, value in values.items():
        name = aliases.get(key, key)
        if name in FIELDS or name == "use_data_init":
            fields[name] = value
        elif name in _takes(algorithms) and not (name in DROPOUTS and values.get("algo") == "tlora"):
            arguments[key] = value
        elif name in ARGUMENTS:
            if not is_off(value):
                source.add(key, _not_taken(name, algorithms))
        elif problem := refusal("lycoris", key, value, known=known):
            source.add(key, problem)
    return arguments, fields


def _not_taken(name: str, algorithms: frozenset[str]) -> str:
    if "tlora" in algorithms and name in DROPOUTS:
        return "not supported with algo tlora, whose rank schedule regularises. Remove it or set it to 0."
    if name == "full_matrix" and "tlokr" in algorithms:
        return "not taken by algo tlokr, whose rank schedule needs the larger factor in two parts. Remove it."
    if "tlora" in algorithms and name == "bypass_mode":
        return "not taken by algo tlora, which always adds to the base layer's output. Remove it."
    owners = ", ".join(algo for algo, record in ALGORITHMS.items() if name in record.arguments)
    return f"not taken by algo {' or '.join(sorted(algorithms))}. Remove it; it belongs to {owners}."


def _with_init(fields: Mapping[str, JsonValue], source: Source) -> dict[str, JsonValue]:
    """The fields with tlora_init in place of LyCORIS's use_data_init."""
    rest = dict(fields)
    if "use_data_init" not in rest:
        return rest
    value = rest.pop("use_data_init")
    asked = {"true": True, "false": False}.get(str(value).lower())
    if asked is None:
        source.reject("use_data_init", value, "must be true or false.")
        return rest
    init = rest.setdefault("tlora_init", _INIT_OF_DATA[asked])
    if init != _INIT_OF_DATA[asked]:
        source.add(
            "use_data_init",
            f"{str(asked).lower()} means tlora_init {_INIT_OF_DATA[asked]}, but tlora_init is "
            f"{shown(init)}. Keep tlora_init and remove use_data_init.",
        )
    return rest


def _without(
    idle: Collection[str], fields: Mapping[str, JsonValue], source: Source, *, algo: object
) -> dict[str, JsonValue]:
    for key in TLORA_FIELDS:
        if key in fields and key in idle:
            source.add(key, _without_schedule(f"algo is {algo}"))
    return {key: value for key, value in fields.items() if key not in idle}


def _without_schedule(found: str) -> str:
    return f"belongs to algo tlora, but {found}. Remove it, or set algo to tlora."


def _check_preset(preset: JsonValue, source: Source, *, algo: object) -> None:
    """Note and remove the unknown keys of apply_preset and of the entries of its maps."""
    if not isinstance(preset, dict):
        return
    prefix = "apply_preset."
    for key in list(preset):
        if key in TargetPreset.model_fields:
            continue
        value = preset.pop(key)
        if problem := refusal("apply_preset", key, value, known=TargetPreset.model_fields):
            source.add(f"{prefix}{key}", problem)
    for name in MAPS:
        entries = preset.get(name)
        for target, entry in entries.items() if isinstance(entries, dict) else ():
            if isinstance(entry, dict):
                _check_entry(entry, source, key=f"{prefix}{name}.{target}", algo=algo)


def _check_entry(entry: dict[str, JsonValue], source: Source, *, key: str, algo: object) -> None:
    algo = entry.get("algo", algo)
    record, aliases = ALGORITHMS.named(algo), layer_aliases()
    taken = frozenset(ARGUMENTS) if record is None else record.arguments
    known = {name for name in taken if ARGUMENTS[name].is_per_layer} | _LAYER_KEYS
    known |= _SCHEDULE_KEYS if record is None or record.has_rank_schedule else frozenset()
    for name in list(entry):
        plain = aliases.get(name, name)
        if plain in known:
            continue
        value = entry.pop(name)
        if plain in _SCHEDULE_KEYS:
            source.add(f"{key}.{name}", _without_schedule(f"these layers have {algo}"))
        elif plain in TLORA_FIELDS:
            source.add(
                f"{key}.{name}", "applies to the whole adapter. Set it at the top level of the lycoris json."
            )
        elif plain not in ARGUMENTS:
            source.add(f"{key}.{name}", unknown_key(name, known))
        elif not ARGUMENTS[plain].is_per_layer and not (algo == "tlora" and plain in DROPOUTS):
            source.add(
                f"{key}.{name}", "applies to the whole adapter. Set it at the top level of the lycoris json."
            )
        elif not is_off(value):
            source.add(f"{key}.{name}", _not_taken(plain, frozenset({str(algo)})))
