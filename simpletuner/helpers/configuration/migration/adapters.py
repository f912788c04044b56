"""The adapter and the optimiser of a translated run, as every reader writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.choices.algorithms import ALGORITHMS, argument_aliases, idle_options
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS, UNCHANGED
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.problems import shown

_IGNORED = {True: "no effect", False: "not translated"}


def number(value: float) -> JsonValue:
    """A number without a needless fraction: 16, not 16.0."""
    return int(value) if value == int(value) and abs(value) < 1e15 else value


def put_lora(draft: Draft, *, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0) -> None:
    """A LoRA by PEFT on the named layers."""
    draft.config.update({"lora_type": "standard", "lora_rank": rank, "lora_alpha": number(alpha or rank)})
    if targets:
        draft.config["peft_lora_target_modules"] = list(targets)
    if dropout:
        draft.config["lora_dropout"] = dropout


def expanded(names: Sequence[str], count: int) -> list[str]:
    """The names, those with a * once for each number below `count`."""
    return [name.replace("*", str(index)) for name in names for index in range(count if "*" in name else 1)]


def put_lycoris(
    draft: Draft,
    *,
    algo: str,
    rank: int,
    alpha: float,
    preset: Mapping[str, Any],
    arguments: Mapping[str, JsonValue],
) -> dict[str, str]:
    """A LyCORIS adapter; returns the arguments that it does not take, each with the reason."""
    aliases, accepted = argument_aliases(), ALGORITHMS[algo].arguments
    named = {aliases.get(name, name): value for name, value in arguments.items()}
    left_out = {name: f"{algo} has no such argument here." for name in named if name not in accepted}
    taken = {name: value for name, value in named.items() if name in accepted and not is_off(value)}
    for name, reason in idle_options(algo, taken):
        if taken.pop(name, None) is not None:
            left_out[name] = f"It {reason}"
    draft.config["lora_type"] = "lycoris"
    draft.set_lycoris(
        {
            "algo": algo,
            "multiplier": 1.0,
            "linear_dim": rank,
            "linear_alpha": number(alpha or rank),
            **taken,
            "apply_preset": dict(preset),
        }
    )
    return {
        name: left_out[aliases.get(name, name)] for name in arguments if aliases.get(name, name) in left_out
    }


def fit_to_quantised(draft: Draft) -> None:
    """Set what an adapter needs on a quantised base, and what group offloading needs."""
    precision = str(draft.config.get("base_model_precision", UNCHANGED))
    if draft.config.get("enable_group_offload"):
        draft.change("gradient_checkpointing", True, "enable_group_offload needs it; the result is the same.")
        if "dynamo_backend" in draft.config:
            draft.change("dynamo_backend", "no", "enable_group_offload exchanges weights of blocks.")
        if not PRECISIONS[precision].works_with_group_offload:
            precision = "int8-torchao"
            draft.change("base_model_precision", precision, "enable_group_offload cannot move 4-bit weights.")
    lycoris = draft.lycoris
    if lycoris is None or not PRECISIONS[precision].needs_bypass_mode:
        return
    algorithm = ALGORITHMS[str(lycoris["algo"])]
    if algorithm.adds_to_weight and "bypass_mode" in algorithm.arguments:
        lycoris["bypass_mode"] = True


def put_optimizer(
    settings: Settings,
    key: str,
    arguments: Mapping[str, JsonValue],
    *,
    arguments_key: str,
    defaults: Mapping[str, Any],
) -> None:
    """The optimiser by the table's values of `key`, with those arguments that it has here.

    Args:
        settings: Has the keys.
        key: Names the optimiser.
        arguments: Of the optimiser, as the other program calls them.
        arguments_key: Where they stand, for the decision.
        defaults: Name of our optimiser -> arguments that differ from its defaults here.
    """
    row, draft = settings.rows[key], settings.draft
    found = row.values.get(settings.text(key).lower())
    name = str(found.ours) if found is not None else "adamw"
    if found is not None:
        settings.put(key, "optimizer", name, outcome=found.outcome, text=found.text)
    else:
        draft.config["optimizer"] = name
        settings.decide(key, "not translated", text="Not known here: adamw is used; the result differs.")
    known = OPTIMIZERS[name].arguments
    known_names = {*known, "beta1", "beta2"} if "betas" in known else set(known)
    given = dict(defaults.get(name, {})) | {k: v for k, v in arguments.items() if v is not None}
    taken = {k: v for k, v in given.items() if k in known_names}
    if taken:
        draft.config["optimizer_config"] = taken
    if not settings.has(arguments_key):
        return
    others = sorted(set(arguments) - known_names)
    if not others:
        settings.decide(arguments_key, "translated", ours=f"optimizer_config: {shown(taken)}")
    else:
        text = f"{name} has no {', '.join(others)} here."
        settings.decide(
            arguments_key,
            "approximate" if taken else "not translated",
            ours=f"optimizer_config: {shown(taken)}",
            text=text,
        )


def argument_value(text: str) -> JsonValue:
    """An argument from a text: true, a number, several numbers, or the text."""
    plain = text.strip().strip("\"'").strip("()[] ")
    if plain.lower() in ("true", "false"):
        return plain.lower() == "true"
    parts = [part for part in plain.split(",") if part.strip()]
    try:
        numbers = [number(float(part)) for part in parts]
    except ValueError:
        return plain
    return numbers[0] if len(numbers) == 1 else numbers


def arguments_of(items: Sequence[JsonValue]) -> dict[str, JsonValue]:
    """Name -> value of texts such as conv_dim=4."""
    pairs = (str(item).strip().strip("\"'").partition("=") for item in items)
    return {name.strip(): argument_value(value) for name, found, value in pairs if found}
