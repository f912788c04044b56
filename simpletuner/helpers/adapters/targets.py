"""Resolve the user's targets to layers of the model, with the family's meaning of generic names.

A layer's path decides before the classes around it, and an inner class before an outer one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Any

from lycoris.wrapper import LycorisNetwork
from torch import nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.contracts import TargetAlias
from simpletuner.helpers.errors import ConfigError

GENERIC_TARGETS = ("Attention", "FeedForward")

Options = Mapping[str, Any]
"""Options of some layers: algo, dim, alpha and arguments of the algorithm, under LyCORIS's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The user's `apply_preset` with the class names of a family."""

    modules: Sequence[str]
    names: Sequence[str]
    excluded: Sequence[str]
    module_options: Mapping[str, Options]
    alias_options: Mapping[str, Options]
    """Options of generic names, for the path patterns that a family gives beside class names."""
    name_options: Mapping[str, Options]
    uses_fnmatch: bool
    enable_conv: bool

    def first_match(self, path: str, patterns: Collection[str]) -> str | None:
        """The pattern that decides for a path: the path itself, else the first that matches."""
        if path in patterns:
            return path
        return next((pattern for pattern in patterns if self._matches(pattern, path)), None)

    def _matches(self, pattern: str, path: str) -> bool:
        return fnmatch(path, pattern) if self.uses_fnmatch else re.match(pattern, path) is not None


def translate(preset: Mapping[str, Any], *, aliases: Mapping[str, TargetAlias]) -> Targets:
    """Replace the generic names of the user's `apply_preset` by the family's."""
    modules = list(preset.get("target_module") or [])
    names = list(preset.get("target_name") or [])
    module_options: dict[str, Options] = dict(preset.get("module_algo_map") or {})
    name_options = dict(preset.get("name_algo_map") or {})
    alias_options: dict[str, Options] = {}
    if not (modules or names or module_options or name_options):
        modules = list(GENERIC_TARGETS)
    uses_fnmatch = bool(preset.get("use_fnmatch"))
    for generic, alias in aliases.items():
        alias_names = [as_glob(name) if uses_fnmatch else name for name in alias.names]
        if generic in modules:
            modules = [name for name in modules if name != generic] + list(alias.modules)
            names += alias_names
        if generic in module_options:
            options: Options = module_options.pop(generic)
            module_options |= dict.fromkeys(alias.modules, options)
            alias_options |= dict.fromkeys(alias_names, options)
    return Targets(
        modules=modules,
        names=names,
        excluded=list(preset.get("exclude_name") or []),
        module_options=module_options,
        alias_options=alias_options,
        name_options=name_options,
        uses_fnmatch=uses_fnmatch,
        enable_conv=bool(preset.get("enable_conv", True)),
    )


def as_glob(pattern: str) -> str:
    """Convert a family's regular expression to a file-name pattern, for `use_fnmatch`."""
    return pattern.replace(r"\d+", "*").replace(r"\.", ".").removesuffix("$")


@dataclass(frozen=True, slots=True)
class _Scope:
    """Exclusion and options of the layers in a module, from its own class and those around it."""

    is_excluded: bool = False
    options: Options | None = None
    """None where no class around the layer is a target."""


def resolve(targets: Targets, model: nn.Module) -> dict[str, Options]:
    """Path of every targeted module -> its options, in the model's order; LyCORIS adapts the layers."""
    scopes: dict[str, _Scope] = {}
    found: dict[str, Options] = {}
    for path, module in model.named_modules():
        around = scopes[path.rpartition(".")[0]] if path else _Scope()
        scope = scopes[path] = _scope_of(around, path, type(module).__name__, targets=targets)
        options = _options_of(path, scope, targets)
        if path and options is not None and not scope.is_excluded:
            found[path] = options
    return found


def _scope_of(around: _Scope, path: str, class_name: str, *, targets: Targets) -> _Scope:
    options = around.options
    if class_name in targets.module_options:
        options = targets.module_options[class_name]
    elif options is None and class_name in targets.modules:
        options = {}
    # Layers of an adapter that is already attached are no targets.
    is_excluded = CHILD_PREFIX in path or targets.first_match(path, targets.excluded) is not None
    return _Scope(around.is_excluded or (bool(path) and is_excluded), options)


def _options_of(path: str, scope: _Scope, targets: Targets) -> Options | None:
    """Options of a layer; None if it is no target."""
    for patterns in (targets.name_options, targets.alias_options):
        pattern = targets.first_match(path, patterns)
        if pattern is not None:
            return patterns[pattern]
    is_named = scope.options is None and targets.first_match(path, targets.names) is not None
    return {} if is_named else scope.options


@contextmanager
def preset_in_force(layers: Mapping[str, Options], *, enable_conv: bool) -> Iterator[None]:
    """Set LyCORIS's preset to these layers' paths and options while a network is created.

    LyCORIS keeps its preset on a class, so every key is set each time and the previous preset restored. Paths
    of equal options share one pattern, since LyCORIS tries every pattern on every module.
    """
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
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for path, options in layers.items():
        groups.setdefault(tuple(sorted(options.items())), []).append(path)
    LycorisNetwork.apply_preset(
        {
            "enable_conv": enable_conv,
            "target_module": [],
            "target_name": [],
            "exclude_name": [],
            "module_algo_map": {},
            "name_algo_map": {_pattern_of(paths): dict(options) for options, paths in groups.items()},
            "use_fnmatch": False,
            "lora_prefix": "lycoris",
        }
    )
    try:
        yield
    finally:
        LycorisNetwork.apply_preset(before)


def _pattern_of(paths: Iterable[str]) -> str:
    return rf"(?:{'|'.join(map(re.escape, paths))})\Z"


def check_matches(targets: Targets, model: nn.Module, *, adapted: Sequence[nn.Module]) -> None:
    """Refuse a target or an exclusion that matches no layer.

    Raises:
        ConfigError: A class or pattern matches no layer (the message lists the model's class names), or
            others decide for every layer of an entry of `name_algo_map` or `module_algo_map`.
    """
    _check_exclusions(targets, model)
    adapted_ids = {id(layer) for layer in adapted}
    classes: set[str] = set()
    paths: list[str] = []
    for path, module in model.named_modules():
        if any(id(child) in adapted_ids for child in module.modules()):
            classes.add(type(module).__name__)
        if id(module) in adapted_ids:
            paths.append(path)
    wanted_classes = {*targets.modules, *targets.module_options}
    wanted_names = {*targets.names, *targets.alias_options, *targets.name_options}
    idle = sorted(wanted_classes - classes)
    idle += sorted(
        name for name in wanted_names if all(targets.first_match(path, [name]) is None for path in paths)
    )
    if idle or not adapted:
        hint = _pattern_hint(wanted_names & set(idle), model, targets=targets)
        raise ConfigError(no_match_message(idle or sorted(wanted_classes | wanted_names), model) + hint)
    deciding = {targets.first_match(path, targets.name_options) for path in paths}
    late = [name for name in targets.name_options if name not in deciding]
    if late:
        raise ConfigError(
            f"apply_preset.name_algo_map: {', '.join(late)} has no effect: the first match counts, and "
            "earlier patterns match all of its layers. Write it before them."
        )
    resolved = resolve(targets, model)
    chosen = {id(resolved[path]) for path in paths}
    inner = [name for name, options in targets.module_options.items() if id(options) not in chosen]
    if inner:
        raise ConfigError(
            f"apply_preset.module_algo_map: {', '.join(inner)} has no effect: patterns or classes inside it "
            "decide for all of its layers. Remove it, or the others."
        )


def _check_exclusions(targets: Targets, model: nn.Module) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    idle = [
        name for name in targets.excluded if all(targets.first_match(path, [name]) is None for path in paths)
    ]
    if idle:
        raise ConfigError(
            f"apply_preset.exclude_name: {', '.join(idle)} matches no layer of {type(model).__name__}."
            + (_pattern_hint(idle, model, targets=targets) or " Remove it, or name a layer of this model.")
        )


def _pattern_hint(patterns: Iterable[str], model: nn.Module, *, targets: Targets) -> str:
    """Advice for patterns that match the middle of a path."""
    paths = [path for path, _ in model.named_modules()]
    hints = []
    for pattern in sorted(patterns):
        wider = (
            f"*{pattern}*"
            if targets.uses_fnmatch
            else f".*(?:{pattern})"
            if "|" in pattern
            else f".*{pattern}"
        )
        if any(targets.first_match(path, [wider]) for path in paths):
            hints.append(f"write {wider} for {pattern}")
    matched = "must match the whole path" if targets.uses_fnmatch else "is matched from the start of the path"
    return f" A pattern {matched}: {', '.join(hints)}." if hints else ""


def no_match_message(idle: Sequence[str], model: nn.Module, *, key: str = "apply_preset") -> str:
    """Error message for targets of a key that match no layer."""
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
