"""network_module and network_args of kohya's scripts as an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.migration.adapters import (
    arguments_of,
    expanded,
    put_lora,
    put_lycoris,
)
from simpletuner.helpers.configuration.migration.draft import Settings
from simpletuner.helpers.configuration.migration.paths import Place
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.configuration.text.problems import shown

# Arguments of a plain LoRA that PEFT does not have, and LyCORIS has.
_OF_LYCORIS = ("conv_dim", "conv_alpha", "rank_dropout", "module_dropout")
_SILENT = ("verbose", "disable_conv_cp")


def put_network(settings: Settings, family: str, place: Place) -> None:
    """The adapter of a run.

    Raises:
        ConfigError: The module or its algorithm is not known here.
    """
    facts = load_table("kohya").facts
    module = settings.text("network_module") or "networks.lora"
    words = (word for item in settings.items("network_args") for word in str(item).split())
    given = {key: value for key, value in arguments_of(list(words)).items() if key not in _SILENT}
    if module in facts["plain_lora"]:
        left_out = _plain(settings, family, given)
    elif module in facts["own_algorithms"] or module == "lycoris.kohya":
        left_out = _lycoris(settings, family, given, default=facts["own_algorithms"].get(module, "lora"))
    else:
        raise settings.error("network_module", "not known here. Known are networks.lora and lycoris.kohya.")
    draft = settings.draft
    algo = "LoRA" if draft.lycoris is None else str(draft.lycoris["algo"])
    settings.decide("network_module", "translated", ours=f"lora_type: {draft.config['lora_type']}, {algo}")
    rank, alpha = settings.whole("network_dim"), settings.number("network_alpha")
    settings.decide("network_dim", "translated", ours=f"rank {rank}", text="")
    note = "" if alpha else "0 means the rank."
    settings.decide("network_alpha", "translated", ours=f"alpha {alpha or rank:g}", text=note)
    if settings.has("network_args"):
        reasons = " ".join(f"{name}: {reason}" for name, reason in left_out.items())
        taken = sorted(set(given) - set(left_out))
        outcome: Outcome = "translated" if not left_out else "approximate" if taken else "not translated"
        settings.decide("network_args", outcome, ours=", ".join(taken), text=reasons)
    if settings.text("network_weights"):
        settings.put("network_weights", "init_lora", place.path(settings.text("network_weights")))


def _plain(settings: Settings, family: str, given: Mapping[str, JsonValue]) -> dict[str, str]:
    """A LoRA by PEFT, or by LyCORIS where PEFT lacks something; the arguments that are left out."""
    facts, draft = load_table("kohya").facts, settings.draft
    targets: Mapping[str, Any] = facts["targets"][family]
    rank, alpha, dropout = settings.whole("network_dim"), settings.number("network_alpha"), _dropout(settings)
    presets = facts["lycoris_presets"][family]
    blocks = facts["blocks"].get(str(given.get("train_blocks", "all")))
    own = {
        key: value
        for key, value in given.items()
        if key in _OF_LYCORIS and not is_off(value) and (not key.startswith("conv") or "conv_dim" in presets)
    }
    known = {*own, *_handled(given, joined=targets.get("joined", ""))}
    left_out = {key: "not known here." for key in given if key not in known and not is_off(given[key])}
    if own or blocks:
        preset = blocks or presets["conv_dim" if "conv_dim" in own else "attn-mlp"]
        left_out |= put_lycoris(draft, algo="lora", rank=rank, alpha=alpha, preset=preset, arguments=own)
        settings.skip(
            "network_dropout", "LyCORIS drops ranks or layers instead: rank_dropout, module_dropout."
        )
    else:
        names = expanded(targets["names"], targets.get("single_blocks", 1))
        put_lora(draft, rank=rank, alpha=alpha, targets=names, dropout=dropout)
        if settings.has("network_dropout"):
            settings.decide("network_dropout", "translated", ours=f"lora_dropout: {dropout:g}")
    if targets.get("joined") and is_off(given.get(str(targets["joined"]))):
        text = "q, k and v have a LoRA each here, where kohya's scripts have one for the three."
        settings.decide("network_module", "approximate", ours="lora_type", text=text)
    return left_out


def _handled(given: Mapping[str, JsonValue], *, joined: str) -> set[str]:
    """Arguments that ask for what happens here anyway, or that have been read."""
    same = {"train_blocks", joined}
    if is_off(given.get("conv_dim")):
        same |= {"conv_dim", "conv_alpha"}
    return same


def _dropout(settings: Settings) -> float:
    dropout = settings.number("network_dropout")
    if not 0 <= dropout < 1:
        raise settings.error("network_dropout", "must be at least 0 and below 1.")
    return dropout


def _lycoris(settings: Settings, family: str, given: dict[str, JsonValue], *, default: str) -> dict[str, str]:
    facts = load_table("kohya").facts
    algo = str(given.pop("algo", default)).lower()
    if algo not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise settings.error("network_args", f"algo {shown(algo)} is not known here. Known are {known}.")
    presets = facts["lycoris_presets"][family]
    # kohya's own loha and lokr adapt what its plain LoRA adapts.
    own = "attn-mlp" if settings.text("network_module") in facts["own_algorithms"] else "full"
    wanted = str(given.pop("preset", own))
    left_out = (
        {}
        if wanted in presets
        else {"preset": f"{shown(wanted)} is not known here; the layers of full are adapted."}
    )
    if "unit" in given:
        given["block_size"] = given.pop("unit")
    if "constrain" in given:
        given["constraint"] = given.pop("constrain")
    dropout = _dropout(settings)
    if dropout:
        given["dropout"] = dropout
    left_out |= put_lycoris(
        settings.draft,
        algo=algo,
        rank=settings.whole("network_dim"),
        alpha=settings.number("network_alpha"),
        preset=presets.get(wanted, presets["full"]),
        arguments=given,
    )
    if settings.has("network_dropout"):
        dropped = left_out.pop("dropout", "")
        outcome: Outcome = "no effect" if dropped or not dropout else "translated"
        settings.decide("network_dropout", outcome, ours=f"dropout: {dropout:g}", text=dropped)
    return left_out
