"""Summarise an adapter file: algorithm, layers, ranks, schedule, base model, training."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file, comfyui, labels
from simpletuner.helpers.adapters.files.embeddings import is_embeddings
from simpletuner.helpers.adapters.files.foreign.translation import Reading, read_parts, stated_schedule
from simpletuner.helpers.adapters.files.text_layers import layer_counts, without_encoders
from simpletuner.helpers.adapters.files.token_inspection import TokenInspection, inspect_token
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, VANILLA_KEYS
from simpletuner.helpers.choices.algorithms import ALGORITHMS, STANDARD
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable

CHART_TIMESTEPS = range(0, 1001, 100)
CHART_WIDTH = 40
BOFT_AXES = 4  # of the blocks, which diag-oft stores with three under the same key
# Header entries that are shown in their own place, or hold a value for each layer.
SHOWN_ELSEWHERE = {
    "format",
    "base_model",
    "model_family",
    "model_flavour",
    "trigger_words",
    adapter_file.METADATA_KEY,
    adapter_file.SCHEDULE_KEY,
    adapter_file.LYCORIS_KEY,
    adapter_file.HASH_KEY,
    adapter_file.PATHS_KEY,
    adapter_file.OPTIONS_KEY,
}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Summary of one adapter file."""

    file: str
    bytes: int
    algorithm: str
    init: str | None
    """T-LoRA's init and sig_type; None in a file without them."""
    num_layers: int
    ranks: dict[int, int]
    """Rank -> number of layers; empty for an algorithm without ranks."""
    scales: dict[float, int]
    """alpha / rank -> number of layers."""
    num_values: int
    """Number of stored values, including frozen base factors."""
    num_frozen: int
    """Number of values in base factors."""
    dtypes: tuple[str, ...]
    schedule: dict[str, int | float | str] | None
    own_schedules: dict[str, int]
    """Values that layers have in place of the schedule's -> number of layers."""
    schedule_source: str | None
    """Where another program states the schedule; None for this program's files, and without one."""
    base_model: str | None
    model_family: str | None
    trigger_words: str | None
    targets: Any
    """`apply_preset` of the header's lycoris json."""
    num_base_hashes: int
    training: dict[str, str]
    """The other entries of the header."""
    missing: tuple[str, ...]
    """Parts of a complete T-LoRA file that are missing."""
    text_encoders: dict[str, int]
    """Text encoder -> number of its layers."""
    left_out: dict[str, int]
    """Kind of tensors that are not read -> their number."""
    comfyui: str
    """Whether ComfyUI reads the file, and what to use instead."""

    def as_json(self) -> str:
        """The summary as a json object."""
        return json.dumps(vars(self), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The summary as text."""
        ranks, in_text = _counted(self.ranks, "rank"), self.text_encoders
        own_schedules = "; ".join(f"{own} ({count})" for own, count in self.own_schedules.items())
        lines = [
            ("File", f"{self.file}, {self.bytes / 1e6:.1f} MB, {', '.join(self.dtypes)}"),
            ("Algorithm", self.algorithm + (f", init {self.init}" if self.init else "")),
            ("Layers", f"{self.num_layers}{f': {ranks}' if ranks else ''}"),
            ("Text encoders", ", ".join(f"{name} ({count})" for name, count in in_text.items()) or None),
            ("Scale", _counted(self.scales, "alpha / rank")),
            ("Values", f"{self.num_values:,}" + (f", {self.num_frozen:,} frozen" if self.num_frozen else "")),
            ("Base model", self.base_model),
            ("Family", self.model_family),
            ("Base weights", f"{self.num_base_hashes} layers hashed" if self.num_base_hashes else None),
            ("Targets", json.dumps(self.targets) if self.targets else None),
            ("Trigger words", self.trigger_words),
            *((name, value) for name, value in sorted(self.training.items())),
            ("Missing", "; ".join(self.missing) or None),
            ("Left out", "; ".join(f"{what} ({count})" for what, count in self.left_out.items()) or None),
            ("Own schedules", own_schedules or None),
            ("Schedule", f"from {self.schedule_source}" if self.schedule_source else None),
            ("ComfyUI", self.comfyui),
        ]
        shown = [(printable(name), printable(str(value))) for name, value in lines if value]
        width = max(len(name) for name, _ in shown)
        return "\n".join(
            [*(f"{name:<{width}}  {value}" for name, value in shown), *self._chart(), self._use()]
        )

    def _chart(self) -> list[str]:
        if self.schedule is None:
            return []
        schedule = RankSchedule.from_config(self.schedule)
        stated = ", ".join(f"{key} {value}" for key, value in self.schedule.items())
        lines = ["", f"Active rank by timestep ({stated}):"]
        for share in CHART_TIMESTEPS:
            timestep = share * schedule.num_timesteps // CHART_TIMESTEPS[-1]
            rank = schedule.rank_at(timestep)
            bar = "#" * max(1, round(CHART_WIDTH * rank / schedule.max_rank))
            lines.append(f"  {timestep:>6}  {rank:>5}  {bar}")
        return lines

    def _use(self) -> str:
        model = "" if self.base_model else " --family FAMILY --model MODEL"
        return f'\nImages: simpletuner sample --adapter {shlex.quote(self.file)}{model} --prompt "..."'


def inspect_any(file: Path) -> Inspection | TokenInspection:
    """Read and summarise an adapter file, or the file of a new token.

    Raises:
        AdapterError: The file cannot be read, or its algorithm is unknown.
    """
    stored = adapter_file.read(file, takes_embeddings=True)
    return inspect_token(stored) if is_embeddings(stored) else inspect_read(stored)


def inspect(file: Path) -> Inspection:
    """Read and summarise an adapter file.

    Raises:
        AdapterError: The file cannot be read, or its algorithm is unknown.
    """
    return inspect_read(adapter_file.read(file))


def inspect_read(stored: adapter_file.AdapterFile) -> Inspection:
    """Summarise an adapter file that was read.

    Raises:
        AdapterError: Its algorithm is unknown.
    """
    file = stored.path
    encoders = layer_counts(stored)
    reading = read_parts(without_encoders(stored, encoders))
    layers = reading.foreign.layers
    known = _known_layers(stored, layers)
    released = reading.foreign.in_processors
    algorithm = ", ".join(dict.fromkeys(title for title, _ in known.values()))
    algorithm += " of the authors' release" if released else ""
    specs = [
        (TLoraSpec.read(layers[name]["tlora_schedule"]), rank)
        for name, (_, rank) in known.items()
        if "tlora_schedule" in layers[name]
    ]
    inits = [spec for spec, _ in specs]
    ranks = {name: rank for name, (_, rank) in known.items() if rank is not None}
    scales = [float(layers[name]["alpha"]) / rank for name, rank in ranks.items() if "alpha" in layers[name]]
    frozen = [tensor for parts in layers.values() for name, tensor in parts.items() if name in BASE_KEYS]
    schedule = _schedule(reading)
    lycoris = stored.entry(adapter_file.LYCORIS_KEY) or {}
    header = stored.metadata
    return Inspection(
        file=str(file),
        bytes=file.stat().st_size,
        algorithm=algorithm,
        init=_init(inits) if not released else None,
        num_layers=len(known),
        ranks=_counts(ranks.values()),
        scales=_counts(round(scale, 6) for scale in scales),
        num_values=sum(tensor.numel() for tensor in stored.tensors.values()),
        num_frozen=sum(tensor.numel() for tensor in frozen),
        dtypes=tuple(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()})
        ),
        schedule=schedule,
        own_schedules=_counts(own for spec, rank in specs if (own := _own_values(spec, rank))),
        schedule_source=reading.found.source if reading.found is not None else None,
        base_model=header.get("base_model"),
        model_family=header.get("model_family"),
        trigger_words=header.get("trigger_words"),
        targets=lycoris.get("apply_preset"),
        num_base_hashes=len(stored.entry(adapter_file.HASH_KEY) or {}),
        training={
            key: value
            for key, value in header.items()
            if key not in SHOWN_ELSEWHERE and not key.startswith(labels.PREFIXES)
        },
        missing=tuple(_missing(reading, algorithm=algorithm, specs=inits)),
        text_encoders=encoders,
        left_out=_counts(reading.foreign.left_out.values()),
        comfyui=comfyui.advice({key: each.shape for key, each in stored.tensors.items()}, file=file),
    )


def _known_layers(
    stored: adapter_file.AdapterFile, layers: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, tuple[str, int | None]]:
    """Layer -> (title of its algorithm, rank; None for full rank).

    Raises:
        AdapterError: No layer is of a known algorithm.
    """
    lora = STANDARD.title
    if stored.is_peft:
        lora = f"{lora} in diffusers' format"
    elif any(".lora.down." in key for key in stored.tensors):
        lora = f"{lora} in diffusers' former format"
    parts_of = [
        (suffix.removeprefix("."), record.title, axis)
        for record in ALGORITHMS.values()
        for suffix, axis in record.rank_axes.items()
    ]
    parts_of += [(VANILLA_KEYS[0], lora, 0), ("w_norm", "norms", None)]
    known: dict[str, tuple[str, int | None]] = {}
    for name, parts in layers.items():
        part, title, axis = next((each for each in parts_of if each[0] in parts), ("", "", None))
        if part == "oft_blocks":
            title = ALGORITHMS["boft" if parts[part].ndim == BOFT_AXES else "diag-oft"].title
        if "tlora_schedule" in parts:
            title = ALGORITHMS["tlokr" if part.startswith("lokr") else "tlora"].title
        if part:
            known[name] = title, None if axis is None else parts[part].shape[axis]
    if not known:
        raise AdapterError(
            f"{stored.path}: no layer of a known algorithm; the first key is {min(stored.tensors)}."
        )
    return known


def _schedule(reading: Reading) -> dict[str, int | float | str] | None:
    """The schedule that the file or its program states; None for a default that nothing states."""
    found = reading.found
    if found is not None:
        return found.schedule.config() if found.is_stated else None
    schedule = stated_schedule(reading.file)
    return None if schedule is None else schedule.config()


def _missing(reading: Reading, *, algorithm: str, specs: Sequence[TLoraSpec]) -> list[str]:
    if not algorithm.startswith(ALGORITHMS["tlora"].title):
        return []
    has_base = any(reading.foreign.has(part) for part in BASE_KEYS)
    vanilla = any(each.init == "vanilla" for each in specs)
    is_stated = _schedule(reading) is not None
    return [
        *(["base factors: taken as weight/principal of the model"] if not (has_base or vanilla) else []),
        *(["rank schedule: give it with --schedule, else min_rank 1 and alpha 1.0"] if not is_stated else []),
        *(["base model"] if "base_model" not in reading.file.metadata else []),
    ]


def _init(specs: Sequence[TLoraSpec]) -> str | None:
    found = {each.init if each.init == "vanilla" else f"{each.init}/{each.sig_type}" for each in specs}
    return ", ".join(sorted(found)) or None


def _own_values(spec: TLoraSpec, rank: int | None) -> str:
    """The values that a layer has in place of its network's schedule; empty without any."""
    own = {"min_rank": spec.min_rank, "alpha": spec.alpha}
    stated = [f"{key} {value:g}" for key, value in own.items() if value is not None]
    return ", ".join([f"rank {rank}", *stated]) if stated else ""


def _counts(values: Any) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _counted(counts: Mapping[Any, int], what: str) -> str | None:
    return ", ".join(f"{what} {value:g} ({count})" for value, count in counts.items()) or None
