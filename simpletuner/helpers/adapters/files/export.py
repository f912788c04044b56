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
from torch import Tensor

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.files import adapter_file, comfyui, labels, scales
from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY
from simpletuner.helpers.adapters.files.foreign.alphas import config_of, stated_alpha
from simpletuner.helpers.adapters.files.foreign.translation import (
    ScheduleOptions,
    stated_schedule,
    with_schedule,
)
from simpletuner.helpers.adapters.files.layouts import (
    DOWN_KEYS,
    KeyMap,
    Layout,
    header_of,
    joined_metadata,
    make_key_map,
    tensors_of,
    with_shared_alpha,
)
from simpletuner.helpers.adapters.files.lora_conversion import (
    LoraLayer,
    errors_by_rank,
    exact_lora,
    truncated_lora,
)
from simpletuner.helpers.adapters.files.text_layers import (
    encoders_in,
    text_layers,
    without_encoders,
)
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, TRAINED_KEYS, VANILLA_KEYS, StoredLayer
from simpletuner.helpers.configuration.schema.adapter import CHANGE_THE_BASE
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.new_files import refuse_existing

Form = Literal["exact", "truncated"]
FORMS = {"exact": exact_lora, "truncated": truncated_lora}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Header entries of the source that are untrue of a standard LoRA.
NOT_KEPT = {
    "format",
    adapter_file.SCHEDULE_KEY,
    adapter_file.LYCORIS_KEY,
    METADATA_KEY,
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
    num_renamed: int
    """Number of layers that keep their tensors under another name."""
    had_schedule: bool
    """Whether the adapter has a rank schedule, which the file does not."""
    errors: Mapping[str, float]
    """Path of a layer -> its error relative to the live layer at that rank, including rounding."""
    band_error: float | None
    """Largest error of a layer at any timestep of the band, where the live adapter's active rank differs."""

    @property
    def worst_layer(self) -> str:
        """The layer with the largest error."""
        return max(self.errors, key=lambda path: self.errors[path])

    def summary(self) -> str:
        """File, layers, ranks, errors and use on one line."""
        parts = []
        if self.ranks:
            low, high = min(self.ranks), max(self.ranks)
            ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
            fused = f", fused from {len(self.errors)}" if len(self.ranks) < len(self.errors) else ""
            parts += [
                f"{counted(len(self.ranks), 'layer')} of {ranks}, active rank {self.active_rank}{fused}",
                f"error {fmean(self.errors.values()):.1e} on average, "
                f"{self.errors[self.worst_layer]:.1e} in {self.worst_layer}",
            ]
        if self.num_renamed:
            own = f"{counted(self.num_renamed, 'layer')} with their own tensors"
            parts.append(
                own if self.ranks or not self.had_schedule else f"{own}, active rank {self.active_rank}"
            )
        if self.timesteps is not None and self.band_error is not None:
            first, last = self.timesteps
            parts.append(f"use it at timesteps {first} to {last}; error at most {self.band_error:.1e} there")
        elif self.had_schedule:
            parts.append("it has no rank schedule: this active rank applies at every timestep")
        return f"{self.file}: {'; '.join(parts)}."


@dataclass(frozen=True, slots=True)
class Source:
    """The layers of an adapter file by their path in the denoiser."""

    layers: Mapping[str, StoredLayer]
    """Those that become a standard LoRA."""
    renamed: Mapping[str, Mapping[str, Tensor]]
    """Those that keep their tensors under other names: LoHa, LoKr and DoRA; empty for a LoRA."""
    ranked: Mapping[str, StoredLayer]
    """Of those the ones of T-LoKr: the two parts of the larger factor, as a vanilla layer."""
    schedule: RankSchedule
    """Schedule of the network; without effect if none of its layers has one."""
    metadata: Mapping[str, str]

    def rank_at(self, timestep: int, layer: StoredLayer) -> int:
        """Active rank of one layer, whose schedule may differ from the network's, at a timestep."""
        return self.schedule_of(layer).rank_at(timestep) if has_schedule(layer) else layer.rank

    def gain_at(self, rank: int, layer: StoredLayer) -> float:
        """Factor on a layer's delta when this number of its ranks is active."""
        return self.schedule_of(layer).gain_at(rank) if has_schedule(layer) else 1.0

    @property
    def has_schedule(self) -> bool:
        """Whether any layer has a rank schedule."""
        return any(map(has_schedule, self.layers.values())) or bool(self.ranked)

    def schedule_of(self, layer: StoredLayer) -> RankSchedule:
        """Schedule of one layer."""
        return layer.spec.ranks(layer.rank).schedule_in(self.schedule)

    def lokr_at(self, rank: int, path: str) -> dict[str, Tensor]:
        """The tensors of a T-LoKr layer with this number of active ranks, as a LoKr of that rank.

        A smaller factor in two parts becomes whole: programs differ in whose rank they divide alpha by.
        """
        factor = self.ranked[path]
        down, up = factor.factors_at(rank)
        kept = {key: tensor for key, tensor in self.renamed[path].items() if key != "tlora_schedule"}
        if rank < factor.rank and "lokr_w1_a" in kept:
            kept["lokr_w1"] = (kept.pop("lokr_w1_a").double() @ kept.pop("lokr_w1_b").double()).float()
        alpha = torch.tensor(factor.scale * self.gain_at(rank, factor) * rank)
        return kept | {"lokr_w2_a": up.contiguous(), "lokr_w2_b": down.contiguous(), "alpha": alpha}


def has_schedule(layer: StoredLayer) -> bool:
    """Whether a layer has a rank schedule: true for T-LoRA, vanilla included, false for standard LoRA."""
    return "tlora_schedule" in layer.tensors or TRAINED_KEYS[0] in layer.tensors


def export_adapter(
    file: Path,
    output: Path,
    options: ExportOptions,
    *,
    families: Mapping[str, ModelSpec],
    overwrite: bool = True,
) -> list[Exported]:
    """Write an adapter file as one standard LoRA, or one for each band of timesteps.

    LoHa, LoKr and DoRA layers keep their tensors; layouts kohya and comfyui rename them.

    Args:
        file: A file written by this program: T-LoRA, standard LoRA, or those.
        output: The file to write, with .safetensors added where it is missing; the name of a band's file ends
            in its timesteps.
        options: Layout, form, rank and dtype.
        families: Name -> spec of every model family; the file's header names its own.
        overwrite: Replace files that exist.

    Raises:
        AdapterError: The file cannot be read or exported, or an option is invalid; nothing is written.
        StorageError: A file cannot be written, or exists and may not be replaced.
    """
    whole = adapter_file.read(file)
    stored = without_encoders(whole, encoders_in(whole))
    if options.schedule:
        stored = with_schedule(stored, options.schedule)
    source = read_source(stored)
    name = stored.metadata.get("model_family", "not stated in its header")
    if name not in families:
        known = ", ".join(sorted(families))
        raise AdapterError(f"{file}: its model family is {name}. Known families: {known}.")
    key_map = make_key_map([*source.layers, *source.renamed], options.layout, families[name])
    written = []
    _renamed(source, options.layout, key_map=key_map, spec=families[name], file=file)  # refuses beforehand
    fixed_ranks = _fixed_ranks(source, options)
    refuse_existing((with_suffix(output, fixed.band) for fixed in fixed_ranks), overwrite=overwrite)
    for fixed in fixed_ranks:
        layers, band_error = _converted_layers(source, fixed, options, spec=families[name])
        converted = tensors_of(layers, options.layout, key_map)
        folded, ranked_error = _folded(source, fixed, options)
        renamed = _renamed(folded, options.layout, key_map=key_map, spec=families[name], file=file)
        band_errors = [error for error in (band_error, ranked_error) if error is not None]
        metadata = {key: value for key, value in source.metadata.items() if key not in NOT_KEPT} | {
            "exported_from": file.name,
            "exported_form": f"{options.form}, rank {fixed.rank} of {source.schedule.max_rank} open",
        }
        if fixed.band is not None:
            metadata["timesteps"] = json.dumps(fixed.band)
        metadata |= header_of(layers, options.layout, families[name])
        metadata |= labels.labels_of_export(
            stored.metadata,
            families[name],
            keeps_names=options.layout in ("diffusers", "lycoris"),
            ranks=[layer.rank for layer in layers],
            alphas=[layer.alpha for layer in layers],
            has_other_layers=bool(renamed),
        )
        target = with_suffix(output, fixed.band)
        in_text = _text_tensors(whole, options, metadata=metadata)
        adapter_file.write(target, converted | renamed | in_text, metadata=metadata)
        exported = Exported(
            file=target,
            timesteps=fixed.band,
            active_rank=fixed.rank,
            ranks=[tensor.shape[0] for key, tensor in converted.items() if key.endswith(DOWN_KEYS)],
            num_renamed=len(source.renamed),
            had_schedule=source.has_schedule,
            errors={layer.path: layer.error for layer in layers},
            band_error=max(band_errors, default=None),
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
    overwrite: bool = True,
) -> list[Exported]:
    """Export an attached adapter, at the strength of its training.

    Args:
        adapter: T-LoRA or standard LoRA, also from a file that `export_adapter` refuses as incomplete.
        output: As for `export_adapter`.
        options: Layout, form, rank and dtype.
        family: The denoiser's family.
        metadata: Further header entries.
        overwrite: Replace files that exist.

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
        return export_adapter(file, output, options, families={family.name: family}, overwrite=overwrite)


def read_source(stored: adapter_file.AdapterFile) -> Source:
    """Read the layers of an adapter file for an export.

    Raises:
        AdapterError: A layer has another algorithm, or the file is incomplete, or its schedule is invalid.
    """
    renamed: Mapping[str, Mapping[str, Tensor]] = {}
    if stored.is_peft:
        layers = _peft_layers(stored)
    else:
        layers, renamed = _lycoris_layers(stored)
    ranked = {
        path: _larger_factor(path, parts) for path, parts in renamed.items() if "tlora_schedule" in parts
    }
    largest = max((layer.rank for layer in (*layers.values(), *ranked.values())), default=1)
    schedule = stated_schedule(stored) or RankSchedule(largest, min_rank=largest)
    return Source(layers, renamed, ranked, schedule, stored.metadata)


def _text_tensors(
    file: adapter_file.AdapterFile, options: ExportOptions, *, metadata: dict[str, str]
) -> dict[str, Tensor]:
    """The layers of text encoders in the keys of a layout; PEFT's configuration of them goes into `metadata`.

    Raises:
        AdapterError: A layer is no standard LoRA.
    """
    layers = [layer for name in encoders_in(file) for layer in text_layers(file, name)]
    dtype, tensors = DTYPES[options.dtype], dict[str, Tensor]()
    in_diffusers = options.layout == "diffusers"
    for layer in layers:
        tensors |= layer.in_diffusers_layout() if in_diffusers else layer.in_kohya_layout()
    if in_diffusers and layers:
        metadata[METADATA_KEY] = joined_metadata(metadata.get(METADATA_KEY), layers)
    return {key: each if key.endswith(".alpha") else each.to(dtype) for key, each in tensors.items()}


def _larger_factor(path: str, parts: Mapping[str, Tensor]) -> StoredLayer:
    """The larger factor of a T-LoKr layer. An error relative to it is one relative to the layer's delta."""
    down, up = parts["lokr_w2_b"], parts["lokr_w2_a"]
    own = dict(zip((*VANILLA_KEYS, "alpha"), (down, up, parts["alpha"]), strict=True))
    own["tlora_schedule"] = parts["tlora_schedule"]
    return StoredLayer(path, own, TLoraSpec.read(parts["tlora_schedule"]))


def _lycoris_layers(
    stored: adapter_file.AdapterFile,
) -> tuple[dict[str, StoredLayer], dict[str, dict[str, Tensor]]]:
    """Path -> layer that becomes a LoRA, and path -> tensors of one that is renamed.

    Raises:
        AdapterError: A layer is neither, or incomplete; or another program wrote the file.
    """
    paths = stored.entry(adapter_file.PATHS_KEY)
    if paths is None:
        raise AdapterError(
            f"{stored.path}: its header has no {adapter_file.PATHS_KEY}, so another program wrote it. Give "
            "its base model with --model and --family; in Python, attach it with load_adapter and pass the "
            "adapter to export_live."
        )
    layers = {
        name: scales.with_multiplier(name, parts, stored.multiplier) for name, parts in stored.layers.items()
    }
    renamed = {
        paths.get(name, name): parts
        for name, parts in layers.items()
        if "dora_scale" in parts or parts.keys() & {"hada_w1_a", "lokr_w1", "lokr_w1_a"}
    }
    converted = {
        path: _layer(name, parts, stored.path)
        for name, parts in layers.items()
        if (path := paths.get(name, name)) not in renamed
    }
    return converted, renamed


def _peft_layers(stored: adapter_file.AdapterFile) -> dict[str, StoredLayer]:
    metadata = stored.entry(METADATA_KEY) or {}
    layers = {}
    for key in stored.tensors:
        prefix, _, path = key.removesuffix(".lora_A.weight").partition(".")
        if key.endswith(".lora_B.weight"):
            continue
        if not key.endswith(".lora_A.weight"):
            raise AdapterError(
                f"{stored.path}: {key} is no tensor of a standard LoRA (DoRA cannot be exported)."
            )
        config = config_of({prefix}, metadata)
        if (init := config.get("init_lora_weights")) in CHANGE_THE_BASE:
            raise AdapterError(
                f"{stored.path}: lora_init_type {init} changed the base weights: a tool that adds the LoRA "
                "to the original weights would add its start too. Train with another lora_init_type."
            )
        up_key = key.replace(".lora_A.", ".lora_B.")
        if up_key not in stored.tensors:
            raise AdapterError(f"{stored.path}: the file is incomplete: {up_key} is missing.")
        down, up = stored.tensors[key], stored.tensors[up_key]
        alpha = torch.tensor(stated_alpha(path, config, rank=down.shape[0], path=stored.path))
        parts = dict(zip((*VANILLA_KEYS, "alpha"), (down, up, alpha), strict=True))
        layers[path] = StoredLayer(key, parts, TLoraSpec("vanilla", "last", None))
    return layers


def _layer(name: str, parts: Mapping[str, Tensor], file: Path) -> StoredLayer:
    if set(parts) - {"alpha", "dtype_tensor"} == set(VANILLA_KEYS):  # LyCORIS's algo lora
        return StoredLayer(name, parts, TLoraSpec("vanilla", "last", None))
    if TRAINED_KEYS[0] not in parts and "tlora_schedule" not in parts:
        raise AdapterError(
            f"{file}: {name} is neither T-LoRA, LoRA, LoHa nor LoKr; it has {', '.join(sorted(parts))}. Use "
            "the file itself: `simpletuner inspect` says which programs read it."
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
    if chosen and not source.has_schedule:
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
    source: Source, fixed: _FixedRank, options: ExportOptions, *, spec: ModelSpec
) -> tuple[list[LoraLayer], float | None]:
    """The LoRA layers of one file, and the largest error within its band."""

    def convert(path: str, scale: float) -> LoraLayer:
        stored = source.layers[path]
        make, dtype = FORMS[options.form], DTYPES[options.dtype]
        rank = fixed.rank_of(stored, source)
        layer = make(path, stored, rank=rank, dtype=dtype, scale=scale)
        gain = source.gain_at(rank, stored)
        return layer if gain == 1 else replace(layer, up=(layer.up.double() * gain).to(dtype))

    layers = with_shared_alpha(source.layers, convert, layout=options.layout, spec=spec)
    band_errors = [fixed.band_error_of(source.layers[layer.path], layer, source) for layer in layers]
    return layers, max((error for error in band_errors if error is not None), default=None)


def _folded(source: Source, fixed: _FixedRank, options: ExportOptions) -> tuple[Source, float | None]:
    """The source with T-LoKr as LoKr of a fixed rank, and the largest error of these within the band."""
    folded: dict[str, dict[str, Tensor]] = {}
    errors: list[float] = []
    for path, factor in source.ranked.items():
        rank = fixed.rank_of(factor, source)
        lora = exact_lora(path, factor, rank=rank, dtype=torch.float32, scale=factor.scale)
        error = fixed.band_error_of(factor, replace(lora, up=lora.up * source.gain_at(rank, factor)), source)
        errors += [] if error is None else [error]
        dtype = DTYPES[options.dtype]
        parts = source.lokr_at(rank, path)
        folded[path] = {key: each if key == "alpha" else each.to(dtype) for key, each in parts.items()}
    return replace(source, renamed={**source.renamed, **folded}), max(errors, default=None)


def _renamed(
    source: Source, layout: Layout, *, key_map: KeyMap, spec: ModelSpec, file: Path
) -> dict[str, Tensor]:
    """The layers that keep their tensors, under the names of a layout.

    A layer that the original fuses with others keeps LyCORIS's name, by which ComfyUI finds its rows.

    Raises:
        AdapterError: The layout cannot hold such a layer, or ComfyUI would compute something else.
    """
    if source.renamed and layout == "diffusers":
        path = next(iter(source.renamed))
        raise AdapterError(
            f"{file}: {path} is a LoHa, LoKr or DoRA of LyCORIS, which diffusers does not read. Use --format "
            "comfyui, or load the file with load_into_pipeline."
        )
    own_names = make_key_map(source.renamed, "lycoris", spec)
    tensors: dict[str, Tensor] = {}
    for path, parts in source.renamed.items():
        limit = comfyui.limit_of({key: tensor.shape for key, tensor in parts.items()})
        if limit is not None and layout != "lycoris":
            raise AdapterError(f"{file}: {path} cannot be exported to ComfyUI: {limit.text}.")
        name = (key_map if key_map[path].num_pieces == 1 else own_names)[path].name
        tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
    return tensors


def with_suffix(output: Path, timesteps: Sequence[int] | None = None) -> Path:
    """The file to write: with .safetensors added where it is missing, and the timesteps of a band."""
    if output.suffix != ".safetensors":
        output = output.with_name(f"{output.name}.safetensors")
    if timesteps is None:
        return output
    first, last = timesteps
    return output.with_name(f"{output.stem}-t{first:04d}-{last:04d}{output.suffix}")
