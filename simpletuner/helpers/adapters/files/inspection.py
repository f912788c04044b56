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

from simpletuner.helpers.adapters.files import adapter_file, comfyui, import_formats
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.choices.algorithms import ALGORITHMS, STANDARD
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable

CHART_TIMESTEPS = range(0, 1001, 100)
CHART_WIDTH = 40
LORA_LAYOUTS: Mapping[str, tuple[str, int]] = {
    ".lora_A.weight": (f"{STANDARD.title} in diffusers' format", 0),
    ".lora_down.weight": (STANDARD.title, 0),
    ".lora.down.weight": (f"{STANDARD.title} in diffusers' former format", 0),
}
"""Suffix of a key of a LoRA -> (name of the layout, axis of the tensor that is the rank)."""
# Header entries that are shown in their own place, or hold a value for each layer.
SHOWN_ELSEWHERE = {
    "format",
    "base_model",
    "model_family",
    "model_flavour",
    "trigger_words",
    "lora_adapter_metadata",
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
    comfyui: str
    """Whether ComfyUI reads the file, and what to use instead."""

    def as_json(self) -> str:
        """The summary as a json object."""
        return json.dumps(vars(self), indent=2, ensure_ascii=False)

    def text(self) -> str:
        """The summary as text."""
        ranks = _counted(self.ranks, "rank")
        lines = [
            ("File", f"{self.file}, {self.bytes / 1e6:.1f} MB, {', '.join(self.dtypes)}"),
            ("Algorithm", self.algorithm + (f", init {self.init}" if self.init else "")),
            ("Layers", f"{self.num_layers}{f': {ranks}' if ranks else ''}"),
            ("Scale", _counted(self.scales, "alpha / rank")),
            ("Values", f"{self.num_values:,}" + (f", {self.num_frozen:,} frozen" if self.num_frozen else "")),
            ("Base model", self.base_model),
            ("Family", self.model_family),
            ("Base weights", f"{self.num_base_hashes} layers hashed" if self.num_base_hashes else None),
            ("Targets", json.dumps(self.targets) if self.targets else None),
            ("Trigger words", self.trigger_words),
            *((name, value) for name, value in sorted(self.training.items())),
            ("Missing", "; ".join(self.missing) or None),
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


def inspect(file: Path) -> Inspection:
    """Read and summarise an adapter file.

    Raises:
        AdapterError: The file cannot be read, or its algorithm is unknown.
    """
    stored = adapter_file.read(file)
    released = import_formats.is_released(stored.tensors)
    try:
        tensors = import_formats.convert_released(stored.tensors) if released else stored.tensors
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}") from error
    layers = _layers(tensors)
    if not layers:
        raise AdapterError(f"{file}: no layer of a known algorithm; the first key is {min(tensors)}.")
    names = sorted(layers)
    specs = [TLoraSpec.read(tensors[key]) for key in tensors if key.endswith(".tlora_schedule")]
    algorithm = ", ".join(dict.fromkeys(title for title, _ in layers.values()))
    if released:
        algorithm = f"{ALGORITHMS['tlora'].title} of the authors' release"
    ranks = {name: rank for name, (_, rank) in layers.items() if rank is not None}
    alphas = {name: float(tensors[f"{name}.alpha"]) for name in names if f"{name}.alpha" in tensors}
    frozen = [tensor for key, tensor in tensors.items() if ".base_" in key]
    lycoris = stored.entry(adapter_file.LYCORIS_KEY) or {}
    header = stored.metadata
    return Inspection(
        file=str(file),
        bytes=file.stat().st_size,
        algorithm=algorithm,
        init=_init(specs) if not released else None,
        num_layers=len(names),
        ranks=_counts(ranks.values()),
        scales=_counts(round(alphas[name] / ranks[name], 6) for name in alphas if name in ranks),
        num_values=sum(tensor.numel() for tensor in stored.tensors.values()),
        num_frozen=sum(tensor.numel() for tensor in frozen),
        dtypes=tuple(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()})
        ),
        schedule=_schedule(stored, specs),
        base_model=header.get("base_model"),
        model_family=header.get("model_family"),
        trigger_words=header.get("trigger_words"),
        targets=lycoris.get("apply_preset"),
        num_base_hashes=len(stored.entry(adapter_file.HASH_KEY) or {}),
        training={key: value for key, value in header.items() if key not in SHOWN_ELSEWHERE},
        missing=tuple(_missing(stored, algorithm=algorithm, specs=specs)),
        comfyui=comfyui.advice({key: each.shape for key, each in stored.tensors.items()}, file=file),
    )


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, int | None]]:
    """Layer -> (algorithm, rank; None for full rank), in the order of the algorithms."""
    layers: dict[str, tuple[str, int | None]] = {}
    for suffix, (title, axis) in _layouts().items():
        for key in (key for key in tensors if key.endswith(suffix)):
            name, shape = key.removesuffix(suffix), tensors[key].shape
            if suffix == ".oft_blocks":
                title = ALGORITHMS["boft" if len(shape) == 4 else "diag-oft"].title
            kind = ALGORITHMS["tlora"].title if f"{name}.tlora_schedule" in tensors else title
            layers.setdefault(name, (kind, None if axis is None else shape[axis]))
    return layers


def _layouts() -> dict[str, tuple[str, int | None]]:
    """Suffix of a key -> (algorithm, rank axis), in the order in which a file is searched for them."""
    of_algorithms = {
        suffix: (record.title, axis)
        for record in ALGORITHMS.values()
        for suffix, axis in record.rank_axes.items()
    }
    return {**of_algorithms, **LORA_LAYOUTS, ".w_norm": ("norms", None)}


def _schedule(
    stored: adapter_file.AdapterFile, specs: Sequence[TLoraSpec]
) -> dict[str, int | float | str] | None:
    config = stored.entry(adapter_file.SCHEDULE_KEY)
    stated = next((each.schedule for each in specs if each.schedule is not None), None)
    try:
        schedule = stated if config is None else RankSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{stored.path}: its rank schedule is invalid: {error}.") from error
    return None if schedule is None else schedule.config()


def _missing(stored: adapter_file.AdapterFile, *, algorithm: str, specs: Sequence[TLoraSpec]) -> list[str]:
    if not algorithm.startswith(ALGORITHMS["tlora"].title):
        return []
    has_base = any(".base_" in key for key in stored.tensors)
    vanilla = any(each.init == "vanilla" for each in specs)
    return [
        *(["base factors: taken as weight/principal of the model"] if not (has_base or vanilla) else []),
        *(["rank schedule: set min_rank and alpha in _tlora_config"] if not _schedule(stored, specs) else []),
        *(["base model"] if "base_model" not in stored.metadata else []),
    ]


def _init(specs: Sequence[TLoraSpec]) -> str | None:
    found = {each.init if each.init == "vanilla" else f"{each.init}/{each.sig_type}" for each in specs}
    return ", ".join(sorted(found)) or None


def _counts(values: Any) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _counted(counts: Mapping[Any, int], what: str) -> str | None:
    return ", ".join(f"{what} {value:g} ({count})" for value, count in counts.items()) or None
