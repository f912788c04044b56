"""Translate an adapter file of any known program into LyCORIS's key layout, for one denoiser."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from simpletuner.helpers.adapters.files.adapter_file import LAYER_PREFIX, SCHEDULE_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.alphas import complete_alphas
from simpletuner.helpers.adapters.files.foreign.joined import take_rows
from simpletuner.helpers.adapters.files.foreign.keys import (
    STATIC_KEYS,
    ForeignLayers,
    split_keys,
)
from simpletuner.helpers.adapters.files.foreign.layer_names import Target, find, targets_by_name
from simpletuner.helpers.adapters.files.foreign.schedules import FoundSchedule, find_schedule, with_options
from simpletuner.helpers.adapters.files.scales import rank_of
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule, min_rank_of
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, TRAINED_KEYS, VANILLA_KEYS
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable

logger = logging.getLogger(__name__)

ScheduleOptions = Mapping[str, int | float | str]
"""Any of min_rank (a rank, or a share of it below 1), alpha, kind and scale."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A file in LyCORIS's parts, before its layers are found in a denoiser."""

    file: AdapterFile
    foreign: ForeignLayers
    """Its layers, each with alpha; those of T-LoRA without base factors marked by `tlora_schedule`."""
    found: FoundSchedule | None
    """Its rank schedule; None for one without T-LoRA, or for one that states it as this program does."""

    @property
    def metadata(self) -> dict[str, str]:
        """Entries of the header, with the rank schedule under this program's key."""
        if self.found is None:
            return self.file.metadata
        return self.file.metadata | {SCHEDULE_KEY: json.dumps(self.found.schedule.config())}


@dataclass(frozen=True, slots=True)
class Translation:
    """A file in LyCORIS's key layout."""

    file: AdapterFile
    paths: Mapping[str, str]
    """Layer name -> path of the layer in the denoiser; empty for a file that had the layout already."""


def read_parts(file: AdapterFile, *, schedule: ScheduleOptions | None = None) -> Reading:
    """Sort a file's tensors by layer and part, complete alphas, and find the rank schedule.

    Args:
        file: The file of any known program.
        schedule: Values that replace those of the rank schedule in the file. A standard LoRA that gets one
            becomes a T-LoRA of init vanilla.

    Raises:
        AdapterError: A key is unknown, or the schedule is invalid.
    """
    try:
        return _read_parts(file, schedule)
    except AdapterError as error:
        reason = str(error).removeprefix(f"{file.path}: ")
        raise AdapterError(f"{file.path}: {reason}") from error


def _read_parts(file: AdapterFile, schedule: ScheduleOptions | None) -> Reading:
    foreign = split_keys(file)
    found = find_schedule(file, foreign)
    if schedule:
        own = stated_schedule(file) if found is None else None
        found = found if own is None else FoundSchedule(own, "its header")
        found = with_options(found, schedule, max_rank=_max_rank(foreign), path=file.path)
    layers = {layer: _static(parts) for layer, parts in complete_alphas(file, foreign).items()}
    if found is not None:
        layers = {layer: _marked(parts, found, schedule or {}) for layer, parts in layers.items()}
    if schedule:
        _refuse_unmasked(file, layers)
    return Reading(file, replace(foreign, layers=layers), found)


def translate(
    file: AdapterFile, denoiser: nn.Module, *, schedule: ScheduleOptions | None = None
) -> Translation:
    """The file in LyCORIS's key layout, with the names of this denoiser's layers.

    Left-out tensors and a schedule that nothing states are logged, once per file.

    Raises:
        AdapterError: A key is unknown, a layer is not in the denoiser, or a joined layer cannot be divided.
    """
    reading = read_parts(file, schedule=schedule)
    _report(reading)
    return Translation(_in_own_keys(reading), {}) if reading.foreign.is_own else _placed(reading, denoiser)


def with_schedule(file: AdapterFile, schedule: ScheduleOptions) -> AdapterFile:
    """A file in LyCORIS's key layout with other values of its rank schedule; another file unchanged.

    Raises:
        AdapterError: The schedule is invalid.
    """
    reading = read_parts(file, schedule=schedule)
    return _in_own_keys(reading) if reading.foreign.is_own else file


def _in_own_keys(reading: Reading) -> AdapterFile:
    tensors = {
        f"{LAYER_PREFIX}{layer}.{part}": tensor
        for layer, parts in reading.foreign.layers.items()
        for part, tensor in parts.items()
    }
    return replace(reading.file, tensors=tensors, metadata=reading.metadata)


def paths_in(file: AdapterFile, denoiser: nn.Module) -> list[str]:
    """Paths of the denoiser's layers that a file adapts.

    Raises:
        AdapterError: As for `translate`.
    """
    layers = _targets(read_parts(file), denoiser)
    return [target.path for targets in layers.values() for target in targets]


def _placed(reading: Reading, denoiser: nn.Module) -> Translation:
    file = reading.file
    tensors: dict[str, Tensor] = {}
    paths: dict[str, str] = {}
    for layer, targets in _targets(reading, denoiser).items():
        for target in targets:
            if target.own_name in paths:
                raise AdapterError(
                    f"{file.path}: two of its layers are {target.path}, the second is {layer}."
                )
            paths[target.own_name] = target.path
            try:
                own = take_rows(layer, reading.foreign.layers[layer], target)
            except AdapterError as error:
                raise AdapterError(f"{file.path}: {error}") from error
            own = _in_shape(own, denoiser.get_submodule(target.path))
            tensors |= {f"{target.own_name}.{part}": tensor for part, tensor in own.items()}
    return Translation(replace(file, tensors=tensors, metadata=reading.metadata), paths)


def _targets(reading: Reading, denoiser: nn.Module) -> dict[str, Sequence[Target]]:
    """Layer of the file -> the denoiser's layers that it stands for."""
    names, foreign = targets_by_name(denoiser), reading.foreign
    found = {layer: find(names, layer) for layer in foreign.layers}
    unknown = [layer for layer, targets in found.items() if not targets]
    idle = [layer for layer in unknown if _is_never_called(layer, foreign)]
    missing = [layer for layer in unknown if layer not in idle]
    if missing:
        family = reading.file.metadata.get("model_family")
        trained_on = f" Its model family is {printable(family)}." if family else ""
        raise AdapterError(
            f"{reading.file.path}: {len(missing)} of {len(found)} layers are not in this "
            f"{type(denoiser).__name__}, first {missing[0]}.{trained_on} Use a model of its family."
        )
    if idle:
        logger.warning(
            "%s: %d layers are left out, which the authors' program never calls, first %s.",
            reading.file.path,
            len(idle),
            printable(idle[0]),
        )
    return {layer: targets for layer, targets in found.items() if targets}


def _is_never_called(layer: str, foreign: ForeignLayers) -> bool:
    """Whether a layer exists in the authors' files alone: output and context of blocks without a context."""
    return (
        foreign.in_processors
        and layer.startswith("single_transformer_blocks.")
        and (layer.endswith((".to_out.0", "_proj", ".to_add_out")))
    )


def _max_rank(foreign: ForeignLayers) -> int:
    return max((rank for parts in foreign.layers.values() if (rank := rank_of(parts)) is not None), default=1)


def stated_schedule(file: AdapterFile) -> RankSchedule | None:
    """The rank schedule that a file states as this program does: in its header, else in its layers.

    Raises:
        AdapterError: It is invalid.
    """
    config = file.entry(SCHEDULE_KEY)
    if config is not None:
        try:
            return RankSchedule.from_config(config)
        except (ValueError, TypeError) as error:
            raise AdapterError(
                f"{file.path}: the rank schedule in its header is invalid: {error}."
            ) from error
    specs = (TLoraSpec.read(each) for key, each in file.tensors.items() if key.endswith(".tlora_schedule"))
    return next((spec.schedule for spec in specs if spec.schedule is not None), None)


def own_values(file: AdapterFile) -> dict[str, tuple[int | None, float | None]]:
    """Layer -> min_rank and alpha that it has in place of the schedule's, of the layers that have any."""
    specs = {
        name: TLoraSpec.read(parts["tlora_schedule"])
        for name, parts in file.layers.items()
        if "tlora_schedule" in parts
    }
    return {name: spec.own for name, spec in specs.items() if any(spec.own)}


def _static(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A namesake's layer, which keeps its last rank at every timestep, as a LoRA of that rank."""
    if "tlora_current_rank" not in parts:
        return dict(parts)
    rank = max(1, int(parts["tlora_current_rank"]))
    kept = {part: tensor for part, tensor in parts.items() if part not in STATIC_KEYS}
    if "tlora_alpha" in parts:  # its scale is alpha over the active rank
        kept["alpha"] = parts["tlora_alpha"]
    down, up = (parts[part] for part in VANILLA_KEYS)
    return kept | {VANILLA_KEYS[0]: down[:rank], VANILLA_KEYS[1]: up[:, :rank]}


def _marked(parts: dict[str, Tensor], found: FoundSchedule, options: ScheduleOptions) -> dict[str, Tensor]:
    """The layer with a `tlora_schedule` that tells its init, unless it is none of T-LoRA's.

    The schedule stands in the header; of the layer's own values those stay that no option replaces. A layer
    without base factors stays as it is: weight/principal.
    """
    has_base = any(part in parts for part in BASE_KEYS)
    if "tlora_schedule" in parts:
        spec = replace(TLoraSpec.read(parts["tlora_schedule"]), schedule=None)
    elif set(parts) - {"alpha", "dtype_tensor"} == set(VANILLA_KEYS):
        spec = TLoraSpec("vanilla", "last", None)
    elif has_base:
        spec = TLoraSpec("random", "last", None)
    else:
        return parts
    if "min_rank" in options:
        spec = replace(spec, min_rank=_own_min_rank(options["min_rank"], parts, found.schedule))
    if "alpha" in options:
        spec = replace(spec, alpha=None)
    return parts | {"tlora_schedule": spec.tensor(found.schedule.max_rank)}


def _own_min_rank(value: float | str, parts: Mapping[str, Tensor], network: RankSchedule) -> int | None:
    """What a share of the rank is in this layer, where the network's minimum is another."""
    rank = rank_of(parts)
    if not isinstance(value, float) or rank is None:
        return None
    own = min_rank_of(value, rank)
    return None if own == network.for_rank(rank).min_rank else own


def _refuse_unmasked(file: AdapterFile, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not any({"tlora_schedule", TRAINED_KEYS[0]} & set(parts) for parts in layers.values()):
        parts = ", ".join(sorted(next(iter(layers.values()))))
        raise AdapterError(
            f"{file.path}: schedule is for T-LoRA and standard LoRA; its layers have {parts}. Omit schedule."
        )


def _in_shape(parts: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The parts in the shapes that LyCORIS gives them.

    Some programs keep a convolution's factors as matrices, and a magnitude as a vector.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.ndim < 2:
        return parts
    ones = (1,) * (weight.ndim - 2)
    shaped = dict(parts)
    for part, tensor in parts.items():
        if part in ("q_layer.weight", "base_q") and tensor[0].numel() == weight[0].numel():
            shaped[part] = tensor.reshape(tensor.shape[0], *weight.shape[1:])
        elif part in ("p_layer.weight", "base_p") and tensor.ndim == 2:
            shaped[part] = tensor.reshape(*tensor.shape, *ones)
        elif part == "dora_scale" and tensor.ndim == 1:
            shaped[part] = tensor.reshape(-1, 1, *ones)
    return shaped


def _report(reading: Reading) -> None:
    for reason, count in Counter(reading.foreign.left_out.values()).items():
        logger.warning(
            "%s: %d tensors are left out: %s, which the denoiser does not have.",
            reading.file.path,
            count,
            reason,
        )
    found = reading.found
    if found is None:
        return
    schedule = found.schedule
    stated = f"min_rank {schedule.min_rank}, alpha {schedule.alpha}, kind {schedule.variant}"
    if found.is_stated:
        logger.info("%s: rank schedule from %s: %s.", reading.file.path, found.source, stated)
        return
    logger.warning(
        "%s states no rank schedule; %s is taken: %s. If it was trained with another, pass it as schedule "
        "(--schedule min_rank=..,alpha=..,kind=..); min_rank=%d keeps every rank active, as for a standard "
        "LoRA.",
        reading.file.path,
        found.source,
        stated,
        schedule.max_rank,
    )
