"""T-LoRA files as standard LoRAs, for tools that know nothing of a rank schedule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.foreign.translation import ScheduleOptions, with_schedule
from simpletuner.helpers.adapters.files.layouts import (
    DOWN_KEYS,
    KeyMap,
    Layout,
    common_scales,
    header_of,
    make_key_map,
    tensors_of,
)
from simpletuner.helpers.adapters.files.lora_conversion import (
    LoraLayer,
    errors_by_rank,
    exact_lora,
    truncated_lora,
)
from simpletuner.helpers.adapters.peft_lora import METADATA_KEY
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, TRAINED_KEYS, VANILLA_KEYS, StoredLayer
from simpletuner.helpers.configuration.schema.sections import CHANGE_THE_BASE
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError

Form = Literal["exact", "truncated"]
FORMS = {"exact": exact_lora, "truncated": truncated_lora}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Header entries of the source that are untrue of a standard LoRA.
NOT_KEPT = {
    "format",
    adapter_file.SCHEDULE_KEY,
    adapter_file.LYCORIS_KEY,
    adapter_file.HASH_KEY,
    adapter_file.PATHS_KEY,
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export, at most one of rank, timestep and bands; without one every rank is active."""

    layout: Layout = "diffusers"
    form: Form = "exact"
    """exact: rank 2R, rounding is the only error; truncated: the best approximation of rank R."""
    rank: int | None = None
    """Fix this active rank."""
    timestep: int | None = None
    """Fix the active rank of this timestep."""
    bands: int | None = None
    """Write this number of files, each for an equal share of the timesteps, with its middle's active rank."""
    dtype: str = "fp32"
    """Key of DTYPES."""
    schedule: ScheduleOptions | None = None
    """Values that replace those of the file's rank schedule."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One exported file."""

    file: Path
    timesteps: tuple[int, int] | None
    """First and last timestep of its band; None for all timesteps."""
    active_rank: int
    """Fixed rank of the network; layers of another rank have their own."""
    ranks: Sequence[int]
    """Rank of each layer in the file; a layout may fuse several of the adapter's layers."""
    errors: Mapping[str, float]
    """Path of a layer -> its error relative to the live layer at that rank, including rounding."""
    band_error: float | None
    """Largest error of a layer at any timestep of the band, where the live adapter's active rank differs."""

    @property
    def worst_layer(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda path: self.errors[path])

    def summary(self) -> str:
        """File, layers, ranks and errors on one line."""
        low, high = min(self.ranks), max(self.ranks)
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        fused = f", fused from {len(self.errors)}" if len(self.ranks) < len(self.errors) else ""
        parts = [
            f"{self.file}: {len(self.ranks)} layers of {ranks}, active rank {self.active_rank}{fused}",
            f"error {fmean(self.errors.values()):.1e} on average, "
            f"{self.errors[self.worst_layer]:.1e} in {self.worst_layer}",
        ]
        if self.timesteps is not None and self.band_error is not None:
            first, last = self.timesteps
            parts.append(f"timesteps {first} to {last}, where the error is at most {self.band_error:.1e}")
        return "; ".join(parts) + "."


@dataclass(frozen=True, slots=True)
class Source:
    """The layers of an adapter file by their path in the denoiser."""

    layers: Mapping[str, StoredLayer]
    schedule: RankSchedule
    """Schedule of the network; without effect if none of its layers has one."""
    multiplier: float
    metadata: Mapping[str, str]

    def rank_at(self, timestep: int, layer: StoredLayer) -> int:
        """Active rank of one layer, whose maximum may differ from the network's, at a timestep."""
        return self.schedule.for_rank(layer.rank).rank_at(timestep) if has_schedule(layer) else layer.rank

    def gain_at(self, rank: int, layer: StoredLayer) -> float:
        """Factor on a layer's delta when this number of its ranks is active."""
        return self.schedule.for_rank(layer.rank).gain_at(rank) if has_schedule(layer) else 1.0


def has_schedule(layer: StoredLayer) -> bool:
    """Whether a layer has a rank schedule: true for T-LoRA, vanilla included, false for standard LoRA."""
    return "tlora_schedule" in layer.tensors or TRAINED_KEYS[0] in layer.tensors


def export_adapter(
    file: Path, output: Path, options: ExportOptions, *, families: Mapping[str, ModelSpec]
) -> list[Exported]:
    """Write an adapter file as one standard LoRA, or one for each band of timesteps.

    Args:
        file: A T-LoRA or standard LoRA file written by this program.
        output: The file to write; the name of a band's file ends in its timesteps.
        options: Layout, form, rank and dtype.
        families: Name -> spec of every model family; the file's header names its own.

    Raises:
        AdapterError: The file cannot be read or exported, or an option is invalid; nothing is written.
        StorageError: A file cannot be written.
    """
    stored = adapter_file.read(file)
    if options.schedule:
        stored = with_schedule(stored, options.schedule)
    source = read_source(stored)
    name = stored.metadata.get("model_family", "not stated in its header")
    if name not in families:
        known = ", ".join(sorted(families))
        raise AdapterError(f"{file}: its model family is {name}. Known families: {known}.")
    key_map, written = make_key_map(source.layers, options.layout, families[name]), []
    for fixed in _fixed_ranks(source, options):
        layers, band_error = _converted_layers(source, fixed, options, key_map=key_map)
        tensors = tensors_of(layers, options.layout, key_map)
        metadata = {key: value for key, value in source.metadata.items() if key not in NOT_KEPT} | {
            "exported_from": file.name,
            "exported_form": f"{options.form}, rank {fixed.rank} of {source.schedule.max_rank} open",
        }
        if fixed.band is not None:
            metadata["timesteps"] = json.dumps(fixed.band)
        metadata |= header_of(layers, options.layout, families[name])
        target = _file_name(output, fixed.band)
        adapter_file.write(target, tensors, metadata=metadata)
        exported = Exported(
            file=target,
            timesteps=fixed.band,
            active_rank=fixed.rank,
            ranks=[tensor.shape[0] for key, tensor in tensors.items() if key.endswith(DOWN_KEYS)],
            errors={layer.path: layer.error for layer in layers},
            band_error=band_error,
        )
        written.append(exported)
    return written


def export_live(
    adapter: Adapter,
    output: Path,
    options: ExportOptions,
    *,
    family: ModelSpec,
    metadata: Mapping[str, str] | None = None,
) -> list[Exported]:
    """Export an attached adapter, at the strength of its training.

    Args:
        adapter: T-LoRA or standard LoRA, also from a file that `export_adapter` refuses as incomplete.
        output: As for `export_adapter`.
        options: Layout, form, rank and dtype.
        family: The denoiser's family.
        metadata: Further header entries.

    Raises:
        AdapterError: The adapter cannot be exported, or an option is invalid; nothing is written.
        StorageError: A file cannot be written.
    """
    network = adapter.lycoris_network
    layers = [each for each in network.modules() if isinstance(each, TLoraLayer)] if network else []
    grouped = [each.lora_name for each in layers if each.num_groups > 1]
    if grouped:
        raise AdapterError(
            f"{grouped[0]}: T-LoRA of a grouped convolution cannot be exported. Exclude the layer."
        )
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "live_adapter.safetensors"
        adapter.save(file, metadata={**(metadata or {}), "model_family": family.name})
        return export_adapter(file, output, options, families={family.name: family})


def read_source(stored: adapter_file.AdapterFile) -> Source:
    """Read the layers of an adapter file for an export.

    Raises:
        AdapterError: A layer has another algorithm, or the file is incomplete.
    """
    layers = _peft_layers(stored) if stored.is_peft else _lycoris_layers(stored)
    config = stored.entry(adapter_file.SCHEDULE_KEY)
    largest = max(layer.rank for layer in layers.values())
    schedule = RankSchedule(largest, min_rank=largest) if config is None else RankSchedule.from_config(config)
    return Source(layers, schedule, stored.multiplier, stored.metadata)


def _lycoris_layers(stored: adapter_file.AdapterFile) -> dict[str, StoredLayer]:
    paths = stored.entry(adapter_file.PATHS_KEY)
    if paths is None:
        raise AdapterError(
            f"{stored.path}: its header has no {adapter_file.PATHS_KEY}, so another program wrote it. Give "
            "its base model with --model and --family; in Python, attach it with load_adapter and pass the "
            "adapter to export_live."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        layer, _, part = key.partition(".")
        tensors.setdefault(layer, {})[part] = tensor
    return {paths.get(name, name): _layer(name, parts, stored.path) for name, parts in tensors.items()}


def _peft_layers(stored: adapter_file.AdapterFile) -> dict[str, StoredLayer]:
    config = stored.entry(METADATA_KEY) or {}
    layers = {}
    for key in stored.tensors:
        prefix, _, path = key.removesuffix(".lora_A.weight").partition(".")
        if key.endswith(".lora_B.weight"):
            continue
        if not key.endswith(".lora_A.weight"):
            raise AdapterError(
                f"{stored.path}: {key} is no tensor of a standard LoRA (DoRA cannot be exported)."
            )
        if (init := config.get(f"{prefix}.init_lora_weights")) in CHANGE_THE_BASE:
            raise AdapterError(
                f"{stored.path}: lora_init_type {init} changed the base weights: a tool that adds the LoRA "
                "to the original weights would add its start too. Train with another lora_init_type."
            )
        down, up = stored.tensors[key], stored.tensors[key.replace(".lora_A.", ".lora_B.")]
        own = config.get(f"{prefix}.alpha_pattern") or {}
        common = config.get(f"{prefix}.lora_alpha", down.shape[0])
        alpha = torch.tensor(float(own.get(get_pattern_key(list(own), path), common)))
        parts = dict(zip((*VANILLA_KEYS, "alpha"), (down, up, alpha), strict=True))
        layers[path] = StoredLayer(key, parts, TLoraSpec("vanilla", "last", None))
    return layers


def _layer(name: str, parts: Mapping[str, Tensor], file: Path) -> StoredLayer:
    if set(parts) - {"alpha", "dtype_tensor"} == set(VANILLA_KEYS):  # LyCORIS's algo lora
        return StoredLayer(name, parts, TLoraSpec("vanilla", "last", None))
    if TRAINED_KEYS[0] not in parts and "tlora_schedule" not in parts:
        raise AdapterError(
            f"{file}: {name} is neither T-LoRA nor standard LoRA; it has {', '.join(sorted(parts))}. Files "
            "of other LyCORIS algorithms need no export."
        )
    layer = StoredLayer.read(name, parts)
    if layer.spec.init != "vanilla" and BASE_KEYS[0] not in parts:
        raise AdapterError(
            f"{file}: {name} has no base factors. Give its base model with --model and --family; in "
            "Python, attach the file with load_adapter and pass the adapter to export_live."
        )
    return layer


@dataclass(frozen=True, slots=True)
class _FixedRank:
    """The fixed rank of one file."""

    rank: int
    """Rank of the network."""
    timestep: int | None = None
    """Timestep of that active rank; None where the options give the rank."""
    band: tuple[int, int] | None = None
    """First and last timestep of the file."""

    def rank_of(self, layer: StoredLayer, source: Source) -> int:
        """Rank of one layer; a layer without schedule keeps every rank."""
        if self.timestep is not None:
            return source.rank_at(self.timestep, layer)
        return min(self.rank, layer.rank) if has_schedule(layer) else layer.rank

    def band_error_of(self, layer: StoredLayer, lora: LoraLayer, source: Source) -> float | None:
        """Largest error of a layer's LoRA at any timestep of the band; None without a band."""
        if self.band is None:
            return None
        first, last = self.band
        gains = [source.gain_at(rank, layer) for rank in range(1, layer.rank + 1)]
        errors = errors_by_rank(layer, lora, gains=gains)
        ranks = {source.rank_at(timestep, layer) for timestep in range(first, last + 1)}
        return max(errors[rank - 1] for rank in ranks)


def _fixed_ranks(source: Source, options: ExportOptions) -> list[_FixedRank]:
    """The fixed rank of every file to write."""
    schedule = source.schedule
    chosen = [key for key in ("rank", "timestep", "bands") if getattr(options, key) is not None]
    if len(chosen) > 1:
        raise AdapterError(f"{' and '.join(chosen)} exclude each other. Use one of them.")
    if chosen and not any(map(has_schedule, source.layers.values())):
        raise AdapterError(f"{chosen[0]}: the file is a standard LoRA without a rank schedule. Omit it.")
    end = schedule.num_timesteps
    if options.timestep is not None:
        if not 0 <= options.timestep <= end:
            raise AdapterError(f"timestep {options.timestep} is outside 0..{end} of the file's schedule.")
        return [_FixedRank(schedule.rank_at(options.timestep), options.timestep)]
    if options.bands is not None:
        if not 1 <= options.bands <= end:
            raise AdapterError(f"bands {options.bands} must be in 1..{end}.")
        edges = [round(end * index / options.bands) for index in range(options.bands + 1)]
        bands = [(first, last - int(last < end)) for first, last in pairwise(edges)]
        return [_FixedRank(schedule.rank_at(sum(band) // 2), sum(band) // 2, band) for band in bands]
    rank = schedule.max_rank if options.rank is None else options.rank
    if not 1 <= rank <= schedule.max_rank:
        raise AdapterError(f"rank {rank} must be in 1..{schedule.max_rank}, the rank of the file.")
    return [_FixedRank(rank)]


def _converted_layers(
    source: Source, fixed: _FixedRank, options: ExportOptions, *, key_map: KeyMap
) -> tuple[list[LoraLayer], float | None]:
    """The LoRA layers of one file, and the largest error within its band."""
    make, dtype = FORMS[options.form], DTYPES[options.dtype]
    scales = common_scales({path: stored.scale for path, stored in source.layers.items()}, key_map)
    layers, band_errors = [], []
    for path, stored in source.layers.items():
        rank = fixed.rank_of(stored, source)
        layer = make(path, stored, rank=rank, dtype=dtype, scale=scales[path])
        gain = source.gain_at(rank, stored)
        if gain != 1:
            layer = replace(layer, up=(layer.up.double() * gain).to(dtype))
        layers.append(replace(layer, alpha=layer.alpha * source.multiplier))
        band_errors.append(fixed.band_error_of(stored, layer, source))
    return layers, max((error for error in band_errors if error is not None), default=None)


def _file_name(output: Path, timesteps: Sequence[int] | None) -> Path:
    if timesteps is None:
        return output
    first, last = timesteps
    return output.with_name(f"{output.stem}-t{first:04d}-{last:04d}{output.suffix}")
