"""Find the rank schedule of a T-LoRA file of another program, and where the file states it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from simpletuner.helpers.adapters.files.adapter_file import (
    LAYER_PREFIX,
    LYCORIS_KEY,
    SCHEDULE_KEY,
    AdapterFile,
)
from simpletuner.helpers.adapters.files.foreign.beside import json_beside, text_beside
from simpletuner.helpers.adapters.files.foreign.keys import TLORA_PREFIX, ForeignLayers
from simpletuner.helpers.adapters.files.scales import rank_of
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule, min_rank_of
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.errors import AdapterError

NETWORK_ARGS = "ss_network_args"
NETWORK_MODULE = "ss_network_module"
ROUNDED_MODULES = "networks.tlora"  # and longer names
ROUNDED_KINDS = ("cosine", "linear")
SIDECAR = "lycoris_config.json"
HYPERPARAMETERS = "hparams.yml"


@dataclass(frozen=True, slots=True)
class FoundSchedule:
    """The rank schedule of a file."""

    schedule: RankSchedule
    source: str
    """Where it is stated, for messages."""
    is_stated: bool = True
    """Whether the file or one beside it states it; else it is a default of the file's program."""


@dataclass(frozen=True, slots=True)
class _Sought:
    """A file whose schedule is sought."""

    file: AdapterFile
    foreign: ForeignLayers
    arguments: Mapping[str, str]
    """Arguments of the network, in files of kohya's scripts and their forks."""
    max_rank: int

    def schedule(self, **values: Any) -> RankSchedule:
        """A schedule of the file's rank; values that are not given have their defaults.

        Raises:
            ValueError: A value is outside its range.
        """
        min_rank = int(values.get("min_rank", 1))
        alpha, steps = float(values.get("alpha", 1.0)), int(float(values.get("num_timesteps", 1000)))
        return RankSchedule(
            self.max_rank,
            min_rank=max(1, min(min_rank, self.max_rank)),
            alpha=alpha,
            num_timesteps=steps,
            variant=values.get("variant", "floor"),
        )


def find_schedule(file: AdapterFile, foreign: ForeignLayers) -> FoundSchedule | None:
    """The rank schedule of a file of another program; None for one without T-LoRA, or written here.

    Keys decide before the header: programs use the same words for different schedules.

    Raises:
        AdapterError: The file states a schedule with an invalid value.
    """
    specs = (TLoraSpec.read(parts.get("tlora_schedule")) for parts in foreign.layers.values())
    is_own = SCHEDULE_KEY in file.metadata or any(spec.schedule is not None for spec in specs)
    if is_own or foreign.has("tlora_current_rank"):
        return None
    ranks = [rank for parts in foreign.layers.values() if (rank := rank_of(parts)) is not None]
    sought = _Sought(file, foreign, _network_arguments(file), max(ranks, default=1))
    try:
        for finder in FINDERS:
            found = finder(sought)
            if found is not None:
                return found
    except (ValueError, OverflowError) as error:
        raise AdapterError(f"{file.path}: the rank schedule that it states is invalid: {error}.") from error
    return None


def with_options(
    found: FoundSchedule | None, options: Mapping[str, Any], *, max_rank: int, path: object
) -> FoundSchedule:
    """The schedule with the user's values in place of those found.

    Args:
        found: What the file states; None for nothing.
        options: Any of min_rank, alpha, kind and scale.
        max_rank: Rank of the network.
        path: The file, for messages.

    Raises:
        AdapterError: A value is outside its range.
    """
    start = found.schedule if found is not None else RankSchedule(max_rank)
    values = {("variant" if key == "kind" else key): value for key, value in options.items()}
    try:
        if "min_rank" in values:
            values["min_rank"] = min_rank_of(values["min_rank"], max_rank)
        return FoundSchedule(replace(start, **values), "the schedule option")
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{path}: schedule is invalid: {error}.") from error


def _network_arguments(file: AdapterFile) -> Mapping[str, str]:
    arguments = file.entry(NETWORK_ARGS) or {}
    return {key: str(value) for key, value in arguments.items() if value is not None}


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes", "on")


def _of_header_keys(sought: _Sought) -> FoundSchedule | None:
    """sd-scripts forks that write the schedule's values to header entries of their own."""
    own = {
        key.removeprefix("ss_tlora_"): value
        for key, value in sought.file.metadata.items()
        if key.startswith("ss_tlora_")
    }
    if "rank_schedule" in own:
        return _rounded(
            sought, {f"tlora_{key}": value for key, value in own.items()}, source="ss_tlora_rank_schedule"
        )
    if not own:
        return None
    names = {"min_rank": "min_rank", "alpha": "alpha_rank_scale", "num_timesteps": "max_timestep"}
    values = {name: own[key] for name, key in names.items() if key in own}
    return FoundSchedule(sought.schedule(**values), "ss_tlora_min_rank in its header")


def _of_rounded_module(sought: _Sought) -> FoundSchedule | None:
    """lora-scripts forks, whose network module is named in the header."""
    module = sought.file.metadata.get(NETWORK_MODULE, "")
    if not module.startswith(ROUNDED_MODULES):
        return None
    return _rounded(sought, sought.arguments, source=f"{NETWORK_MODULE} {module}")


def _rounded(sought: _Sought, arguments: Mapping[str, str], *, source: str) -> FoundSchedule:
    kind = arguments.get("tlora_rank_schedule", "").strip().lower() or ROUNDED_KINDS[0]
    if kind not in ROUNDED_KINDS:
        raise ValueError(f"tlora_rank_schedule {kind[:40]!r} is not one of {', '.join(ROUNDED_KINDS)}")
    schedule = sought.schedule(min_rank=arguments.get("tlora_min_rank", 1), variant=kind)
    return FoundSchedule(schedule, f"{source} in its header")


def _of_masked_locon(sought: _Sought) -> FoundSchedule | None:
    """A LyCORIS fork's rank mask on a LoCon."""
    arguments = sought.arguments
    if not _is_true(arguments.get("use_timestep_mask", "")) or not sought.foreign.has("lora_up.weight"):
        return None
    schedule = sought.schedule(
        min_rank=arguments.get("tlora_min_rank", sought.max_rank // 2),
        alpha=arguments.get("tlora_alpha", 1.0),
    )
    return FoundSchedule(schedule, f"use_timestep_mask in its {NETWORK_ARGS}")


def _of_network_arguments(sought: _Sought) -> FoundSchedule | None:
    """LyCORIS through kohya's scripts: a fork masks the ranks, LyCORIS itself never does there."""
    arguments = sought.arguments
    if not sought.foreign.has("lambda_layer") or arguments.get("algo", "").lower() != "tlora":
        return None
    is_stock = not sought.foreign.has("base_q") and "tlora_min_rank" not in arguments
    if is_stock:
        schedule = sought.schedule(min_rank=sought.max_rank)
        return FoundSchedule(schedule, "kohya's scripts, which train LyCORIS's tlora with all ranks open")
    schedule = sought.schedule(
        min_rank=arguments.get("tlora_min_rank", math.ceil(sought.max_rank / 2)),
        alpha=arguments.get("tlora_mask_alpha", arguments.get("tlora_alpha", 1.0)),
    )
    return FoundSchedule(schedule, f"its {NETWORK_ARGS}")


def _of_lycoris_config(sought: _Sought) -> FoundSchedule | None:
    """SimpleTuner: the lycoris json is in a checkpoint's header, and stands beside a final file."""
    if not sought.foreign.has("lambda_layer") or LAYER_PREFIX not in sought.foreign.prefixes:
        return None
    config, source = sought.file.entry(LYCORIS_KEY), f"{LYCORIS_KEY} in its header"
    if config is None:
        config, source = json_beside(sought.file.path, SIDECAR), f"{SIDECAR} beside it"
        # In a folder of several files the json may be another's.
        if config is None or config.get("algo") != "tlora" or config.get("linear_dim") != sought.max_rank:
            return None
    values = {"min_rank": "tlora_min_rank", "alpha": "tlora_alpha"}
    stated = {name: _number(config[key], key) for name, key in values.items() if key in config}
    return FoundSchedule(sought.schedule(**stated), source)


def _number(value: object, key: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} {str(value)[:40]!r} is no number")
    return value


def _of_prefix(sought: _Sought) -> FoundSchedule | None:
    """Files whose layers begin with tlora_ have one schedule by their program's contract."""
    is_tlora = sought.foreign.has("lambda_layer") or sought.foreign.has("lora_up.weight")
    if not is_tlora or TLORA_PREFIX not in sought.foreign.prefixes:
        return None
    return FoundSchedule(sought.schedule(), "the prefix tlora_ of its keys")


def _of_processors(sought: _Sought) -> FoundSchedule | None:
    """The T-LoRA authors' release; their training writes its options beside the file."""
    if not sought.foreign.in_processors:
        return None
    text = text_beside(sought.file.path, HYPERPARAMETERS) or ""
    names = {"min_rank": "min_rank", "alpha": "alpha_rank_scale"}
    matches = {name: re.search(rf"^\s*{key}:\s*([\d.]+)\s*$", text, re.M) for name, key in names.items()}
    values = {name: match[1] for name, match in matches.items() if match}
    if values:
        return FoundSchedule(sought.schedule(**values), f"{HYPERPARAMETERS} beside it")
    return FoundSchedule(sought.schedule(), "the authors' default", is_stated=False)


def _of_factors(sought: _Sought) -> FoundSchedule | None:
    """Any other file with T-LoRA's factors: a default."""
    if not sought.foreign.has("lambda_layer") and not sought.foreign.has("tlora_schedule"):
        return None
    return FoundSchedule(sought.schedule(), "the default", is_stated=False)


FINDERS: tuple[Callable[[_Sought], FoundSchedule | None], ...] = (
    _of_header_keys,
    _of_rounded_module,
    _of_masked_locon,
    _of_network_arguments,
    _of_lycoris_config,
    _of_prefix,
    _of_processors,
    _of_factors,
)
"""In the order in which a file is searched."""
