"""Json files and presets of the graphical program for kohya's scripts, as settings of a script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.schema.values import is_off
from simpletuner.helpers.configuration.text.problems import shown
from simpletuner.helpers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Graphical:
    """One file: what the program passes on to a script, and what it keeps."""

    script: str
    values: Mapping[str, JsonValue]
    """The script's settings."""
    used: Mapping[str, str]
    """Key that is part of another setting -> that setting."""
    rest: Mapping[str, JsonValue]
    """Keys that the script does not get under their own name."""


def read_graphical(values: Mapping[str, JsonValue]) -> Graphical:
    """The script and its settings.

    Raises:
        ConfigError: The file is of a kind that is not known here.
    """
    facts: Mapping[str, Any] = load_table("kohya").facts["graphical"]
    kind = str(values.get("LoRA_type", ""))
    network = facts["network"].get(kind)
    if network is None:
        known = ", ".join(facts["network"])
        raise ConfigError(f"LoRA_type: {shown(kind)}: not known here. Known are {known}.")
    kept = {*load_table("kohya").rows("graphical"), *facts["booleans"]}
    passed: dict[str, JsonValue] = {
        facts["names"].get(key, key): value
        for key, value in values.items()
        if key not in kept
        and value not in ("", None)
        and not (key in facts["zero_is_none"] and is_off(value))
    }
    used = dict.fromkeys(("LoRA_type", *facts["scripts"]), "the script and network_module")
    for ours, theirs in facts["booleans"].items():
        if values.get(ours):
            passed[theirs], used[ours] = True, theirs
    given = {name: values.get(name) for name in network.get("arguments", ())}
    arguments: list[JsonValue] = [f"{name}={value}" for name, value in given.items() if not is_off(value)]
    used |= dict.fromkeys((name for name in given if not is_off(given[name])), "network_args")
    if "algo" in network:
        arguments += [f"algo={network['algo']}", f"preset={values.get('LyCORIS_preset') or 'full'}"]
        used["LyCORIS_preset"] = "network_args"
    passed |= {"network_module": network["module"], "network_args": arguments}
    if not passed.get("max_train_epochs") and not passed.get("max_train_steps"):
        passed["max_train_epochs"], used["epoch"] = values.get("epoch", 1), "max_train_epochs"
    percent = values.get("lr_warmup")
    if not is_off(percent) and is_off(passed.get("lr_warmup_steps")):
        passed["lr_warmup_steps"], used["lr_warmup"] = float(str(percent)) / 100, "lr_warmup_steps"
    if is_off(values.get("text_encoder_lr")):
        passed["network_train_unet_only"] = True
    script = next((name for box, name in facts["scripts"].items() if values.get(box)), "train_network")
    rest = {key: value for key, value in values.items() if facts["names"].get(key, key) not in passed}
    return Graphical(script, passed, used, rest)


def decide_rest(graphical: Graphical, draft: Draft) -> None:
    """Decide the keys that the script does not get under their own name."""
    settings = Settings(graphical.rest, load_table("kohya").rows("graphical"), draft)
    for key, value in graphical.rest.items():
        if key in graphical.used and not is_off(value):
            settings.decide(key, "translated", ours=graphical.used[key], text="")
        elif is_off(value):
            settings.decide(key, "no effect", text="Off, as here.")
        elif key in settings.rows and settings.rows[key].is_computed:
            settings.decide(key, "no effect", text="Not of this type of network, or another key counts.")
    settings.finish(into={})
