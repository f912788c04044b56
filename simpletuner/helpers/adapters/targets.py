"""Which layers an adapter is for: the user's names, as the family means them, checked against the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any

from lycoris.wrapper import LycorisNetwork
from torch import nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.contracts import TargetAlias
from simpletuner.helpers.errors import ConfigError

GENERIC_TARGETS = ("Attention", "FeedForward")

Preset = dict[str, Any]


def translate(preset: Mapping[str, Any], *, aliases: Mapping[str, TargetAlias]) -> Preset:
    """A complete LyCORIS preset from the user's `apply_preset`, generic names replaced by the family's own.

    Every key is present, because LyCORIS keeps presets on a class and what is left out leaks from one network
    to the next.
    """
    modules = list(preset.get("target_module") or [])
    names = list(preset.get("target_name") or [])
    module_algos = dict(preset.get("module_algo_map") or {})
    name_algos = dict(preset.get("name_algo_map") or {})
    if not (modules or names or module_algos or name_algos):
        modules = list(GENERIC_TARGETS)
    uses_fnmatch = bool(preset.get("use_fnmatch"))
    for generic, alias in aliases.items():
        alias_names = [as_glob(name) if uses_fnmatch else name for name in alias.names]
        if generic in modules:
            modules = [name for name in modules if name != generic] + list(alias.modules)
            names += alias_names
        if generic in module_algos:
            options = module_algos.pop(generic)
            module_algos |= dict.fromkeys(alias.modules, options)
            name_algos |= dict.fromkeys(alias_names, options)
    return {
        "enable_conv": bool(preset.get("enable_conv", True)),
        "target_module": list(dict.fromkeys(modules)),
        "target_name": list(dict.fromkeys(names)),
        # The layers of an adapter that is attached already are not the model's.
        "exclude_name": [
            *(preset.get("exclude_name") or []),
            f"*{CHILD_PREFIX}*" if uses_fnmatch else f".*{CHILD_PREFIX}",
        ],
        "module_algo_map": module_algos,
        "name_algo_map": name_algos,
        "use_fnmatch": uses_fnmatch,
        "lora_prefix": "lycoris",
    }


def as_glob(pattern: str) -> str:
    """A family's regular expression as the file-name pattern that `use_fnmatch` asks for."""
    return pattern.replace(r"\d+", "*").replace(r"\.", ".").removesuffix("$")


@contextmanager
def preset_in_force(preset: Preset) -> Iterator[None]:
    """Set LyCORIS's class-level preset while a network is created, and put back what was there."""
    before = {
        "enable_conv": LycorisNetwork.ENABLE_CONV,
        "target_module": LycorisNetwork.TARGET_REPLACE_MODULE,
        "target_name": LycorisNetwork.TARGET_REPLACE_NAME,
        "exclude_name": LycorisNetwork.TARGET_EXCLUDE_NAME,
        "module_algo_map": LycorisNetwork.MODULE_ALGO_MAP,
        "name_algo_map": LycorisNetwork.NAME_ALGO_MAP,
        "use_fnmatch": LycorisNetwork.USE_FNMATCH,
        "lora_prefix": LycorisNetwork.LORA_PREFIX,
    }
    LycorisNetwork.apply_preset(preset)
    try:
        yield
    finally:
        LycorisNetwork.apply_preset(before)


def check_matches(preset: Preset, model: nn.Module, *, adapted: Sequence[nn.Module]) -> None:
    """Refuse a target that adapts nothing.

    Raises:
        ConfigError: A named class or pattern matches no layer; the message lists the model's own class names.
    """
    adapted_ids = {id(layer) for layer in adapted}
    classes: set[str] = set()
    paths: list[str] = []
    for path, module in model.named_modules():
        if any(id(child) in adapted_ids for child in module.modules()):
            classes.add(type(module).__name__)
        if id(module) in adapted_ids:
            paths.append(path)
    wanted_classes = {*preset["target_module"], *preset["module_algo_map"]}
    wanted_names = {*preset["target_name"], *preset["name_algo_map"]}
    idle = sorted(wanted_classes - classes)
    idle += sorted(name for name in wanted_names if not any(_matches(name, path, preset) for path in paths))
    if idle or not adapted:
        raise ConfigError(no_match_message(idle or sorted(wanted_classes | wanted_names), model))


def no_match_message(idle: Sequence[str], model: nn.Module, *, key: str = "apply_preset") -> str:
    """What to tell a user whose targets, under this key, match no layer."""
    counts = Counter(
        type(module).__name__
        for module in model.modules()
        if not isinstance(module, nn.Linear)
        and any(isinstance(child, nn.Linear) for child in module.modules())
    )
    near = {name: match for name in idle if (match := get_close_matches(name, counts, n=1))}
    hint = "".join(f" Did you mean {match[0]} instead of {name}?" for name, match in near.items())
    available = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return (
        f"{key}: {', '.join(idle)} matches no layer of {type(model).__name__}.{hint} "
        f"Classes with linear layers in this model: {available}. "
        f"{' and '.join(GENERIC_TARGETS)} mean this family's attention and feed-forward layers."
    )


def _matches(pattern: str, path: str, preset: Preset) -> bool:
    if pattern == path:
        return True
    return fnmatch(path, pattern) if preset["use_fnmatch"] else re.match(pattern, path) is not None
