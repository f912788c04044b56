"""Adapter files as layers to merge or to resize, and the LoRA files that are made of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path

from torch import nn

from simpletuner.helpers.adapters.files import adapter_file, labels
from simpletuner.helpers.adapters.files.adapter_file import AdapterFile, layer_name
from simpletuner.helpers.adapters.files.export import NOT_KEPT, Source, has_schedule, read_source
from simpletuner.helpers.adapters.files.foreign.translation import translate
from simpletuner.helpers.adapters.files.layouts import KeyMap, Layout, header_of, tensors_of
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.adapters.files.text_layers import encoders_in
from simpletuner.helpers.adapters.tlora.stored_layer import (
    BASE_KEYS,
    TRAINED_KEYS,
    VANILLA_KEYS,
    StoredLayer,
)
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import counted, printable

logger = logging.getLogger(__name__)

MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
# Header entries that are true of one file and of no other.
OF_ONE_FILE = {
    *NOT_KEPT,
    adapter_file.OPTIONS_KEY,
    adapter_file.MULTIPLIER_KEY,
    adapter_file.METADATA_KEY,
    "exported_from",
    "exported_form",
    "timesteps",
    "merged_from",
    "resized_from",
    "trigger_words",
    labels.HASH,
    labels.TITLE,
    labels.TRIGGERS,
    labels.USAGE,
    "ss_output_name",
    "ss_network_args",
    "ss_network_module",
}


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The denoiser that names the layers of other programs' files."""

    family: str
    denoiser: nn.Module
    """On meta: only its layers' names and shapes are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An adapter file whose layers are found by their paths in the denoiser."""

    file: Path
    source: Source
    shapes: Mapping[str, tuple[int, ...]]
    """Path -> shape of the layer's weight as far as the file or the model says."""

    @property
    def scheduled(self) -> list[str]:
        """Paths of the layers whose active rank depends on the timestep."""
        layers = {**self.source.layers, **self.source.ranked}
        return [path for path, layer in layers.items() if self.changes_with_timestep(layer)]

    def changes_with_timestep(self, layer: StoredLayer) -> bool:
        """Whether fewer than all ranks of a layer are active at some timestep."""
        own = self.source.schedule_of(layer)
        return has_schedule(layer) and own.min_rank < own.max_rank

    @property
    def paths(self) -> list[str]:
        """Paths of all layers."""
        return [*self.source.layers, *self.source.renamed]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A written file, and the error of each layer."""

    file: Path
    layers: Sequence[LoraLayer]
    what: str
    """What the file is, for people."""
    notes: Sequence[str] = ()
    """Further lines of the summary."""
    left_out: Sequence[str] = ()
    """One line for each weight that the file cannot hold."""

    @property
    def total_error(self) -> float:
        """Frobenius norm of all differences together, relative to that of all deltas."""
        whole = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error * layer.norm for layer in self.layers)) / whole if whole else 0.0

    def summary(self) -> str:
        """File, layers, ranks and errors, and the notes, on lines of their own."""
        ranks = [layer.rank for layer in self.layers]
        worst = max(self.layers, key=lambda layer: layer.error)
        low, high = min(ranks), max(ranks)
        first = (
            f"{printable(str(self.file))}: {self.what}, {counted(len(ranks), 'layer')} of "
            f"{f'rank {low}' if low == high else f'ranks {low} to {high}'}; error {self.total_error:.1e} in "
            f"total, {worst.error:.1e} in {printable(worst.path)}."
        )
        return "\n".join([first, *self.notes])

    def text(self, *, per_layer: bool) -> str:
        """The summary, and if wanted error, rank and path of each layer, the largest error first."""
        if not per_layer:
            return self.summary()
        ordered = sorted(self.layers, key=lambda layer: -layer.error)
        lines = [f"{layer.error:.1e}  rank {layer.rank:<4} {printable(layer.path)}" for layer in ordered]
        return "\n".join([self.summary(), *lines, *self.left_out])


def open_adapter(file: Path, *, families: Mapping[str, ModelSpec], base: BaseModel | None) -> Opened:
    """Read an adapter file of any known program.

    Args:
        file: The file.
        families: Name -> spec of every model family.
        base: The base model; None to read files that name their layers by path only.

    Raises:
        AdapterError: The file cannot be read, is a DoRA, of another algorithm or of another family than the
            base model, or needs it.
    """
    stored = adapter_file.read(file)
    _refuse_text_encoders(stored)
    _refuse_dora(stored)
    family = stored.metadata.get("model_family")
    if base is not None and family not in (None, base.family):
        raise AdapterError(
            f"{file} is for the family {printable(str(family))}, the base model of --model for {base.family}."
        )
    if not _names_its_layers(stored, families):
        if base is None:
            raise AdapterError(
                f"{file}: its header does not name its layers, so their paths are those of another layout. "
                "Give the base model with --model; only the configuration of its denoiser is read."
            )
        stored = _with_paths(stored, base.denoiser)
    _refuse_unknown_base(stored)
    source = read_source(stored)
    shapes = {path: _shape_of(path, layer, file=file) for path, layer in source.layers.items()}
    if base is not None:
        shapes = _checked(shapes, source, base.denoiser, file=file)
    return Opened(file=file, source=source, shapes=shapes)


def family_of(
    opened: Sequence[Opened], *, families: Mapping[str, ModelSpec], base: BaseModel | None
) -> ModelSpec:
    """The family of all files: the base model's, else the one that their headers state.

    Raises:
        AdapterError: The files are of different families, or their family is unknown.
    """
    if base is not None:
        return families[base.family]
    stated = {str(each.file): each.source.metadata.get("model_family") for each in opened}
    name = next(iter(stated.values()))
    if len(set(stated.values())) > 1:
        found = ", ".join(f"{file} is for {family or 'an unknown one'}" for file, family in stated.items())
        raise AdapterError(f"The model families differ: {printable(found)}. Give files of one family.")
    if name not in families:
        raise AdapterError(
            f"{opened[0].file}: its model family is {printable(name or 'not stated in its header')}. Known "
            f"families: {', '.join(sorted(families))}."
        )
    return families[str(name)]


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def warn_about_other_bases(opened: Sequence[Opened]) -> None:
    """Warn of files that were trained on other base weights than the first."""
    first = opened[0]
    for other in opened[1:]:
        pairs = [
            (hashes[name], value)
            for name, value in _hashes(other).items()
            if name in (hashes := _hashes(first))
        ]
        differing = sum(one != two for one, two in pairs)
        names = [each.source.metadata.get("base_model") for each in (first, other)]
        if differing:
            logger.warning(
                "%s and %s were trained on different base weights: %d of %d layers differ. Their sum fits "
                "neither base model as each alone does.",
                printable(str(first.file)),
                printable(str(other.file)),
                differing,
                len(pairs),
            )
        elif not pairs and None not in names and names[0] != names[1]:
            logger.warning(
                "%s was trained on %s, %s on %s. Their sum fits neither base model as each alone does.",
                printable(str(first.file)),
                printable(str(names[0])),
                printable(str(other.file)),
                printable(str(names[1])),
            )


def common_header(opened: Sequence[Opened], *, spec: ModelSpec) -> dict[str, str]:
    """Header entries that are true of a file made of these: those that all share, and all trigger words."""
    headers = [each.source.metadata for each in opened]
    shared = {
        key: value
        for key, value in headers[0].items()
        if key not in OF_ONE_FILE and all(header.get(key) == value for header in headers)
    }
    hashes: dict[str, str] = {}
    agree = True
    for each in opened:
        agree = agree and all(hashes.get(name, value) == value for name, value in _hashes(each).items())
        hashes |= _hashes(each)
    triggers = _joined_words(header.get("trigger_words", "") for header in headers)
    phrase = _joined_words(header.get(labels.TRIGGERS, "") for header in headers)
    title = " + ".join(dict.fromkeys(header[labels.TITLE] for header in headers if labels.TITLE in header))
    return shared | {
        key: value
        for key, value in {
            "model_family": spec.name,
            adapter_file.VERSION_KEY: adapter_file.VERSION,
            adapter_file.HASH_KEY: json.dumps(hashes) if hashes and agree else "",
            "trigger_words": triggers,
            labels.TITLE: title,
            labels.TRIGGERS: phrase,
            labels.USAGE: labels.usage_hint(phrase) if phrase else "",
        }.items()
        if value
    }


def write_lora(
    target: Path,
    layers: Sequence[LoraLayer],
    *,
    layout: Layout,
    spec: ModelSpec,
    key_map: KeyMap,
    metadata: Mapping[str, str],
) -> None:
    """Write layers as a LoRA in a layout, with this metadata and its labels.

    Raises:
        AdapterError: A value is not finite, or the shapes of layers that the layout joins differ.
        StorageError: The file cannot be written.
    """
    own = labels.labels_of_export(
        metadata,
        spec,
        keeps_names=layout in ("diffusers", "lycoris"),
        ranks=[layer.rank for layer in layers],
        alphas=[layer.alpha for layer in layers],
        has_other_layers=False,
    )
    paths = {}
    if layout == "lycoris":
        paths[adapter_file.PATHS_KEY] = json.dumps({layer_name(layer.path): layer.path for layer in layers})
    adapter_file.write(
        target,
        tensors_of(layers, layout, key_map),
        metadata={**metadata, **own, **paths, **header_of(layers, layout, spec)},
    )


def _refuse_dora(stored: AdapterFile) -> None:
    for key in stored.tensors:
        if any(f".{part}" in key for part in MAGNITUDES):
            raise AdapterError(
                f"{stored.path}: {printable(key)} is of a DoRA. Its magnitudes set the length of base weight "
                "and LoRA together, so its delta depends on the base weights and is no sum of ranks. Use the "
                "file itself."
            )


def _refuse_text_encoders(stored: AdapterFile) -> None:
    """Refuse a file of this program or of diffusers with text encoders, which the new file would not have."""
    is_complete = adapter_file.PATHS_KEY in stored.metadata or adapter_file.METADATA_KEY in stored.metadata
    if is_complete and (names := encoders_in(stored)):
        raise AdapterError(
            f"{stored.path}: it has layers of {' and '.join(names)}, which are neither merged nor resized. "
            "Use the file itself, or the export of `simpletuner export`."
        )


def _names_its_layers(stored: AdapterFile, families: Mapping[str, ModelSpec]) -> bool:
    """Whether the paths of a file's layers are known without its base model."""
    if adapter_file.PATHS_KEY in stored.metadata:
        return True
    spec = families.get(stored.metadata.get("model_family", ""))
    is_own = adapter_file.METADATA_KEY in stored.metadata and spec is not None
    return is_own and all(key.startswith(f"{spec.denoiser_name}.") for key in stored.tensors)  # type: ignore[union-attr]  # is_own says so


def _with_paths(stored: AdapterFile, denoiser: nn.Module) -> AdapterFile:
    """The file in LyCORIS's key layout, with the paths of its layers in the header."""
    translated = translate(stored, denoiser).file
    own_names = {layer_name(path): path for path, _ in denoiser.named_modules() if path}
    unknown = sorted(translated.layers.keys() - own_names.keys())
    if unknown:
        raise AdapterError(
            f"{stored.path}: {len(unknown)} of {len(translated.layers)} layers are not in this "
            f"{type(denoiser).__name__}, first {printable(unknown[0])}. Give its base model with --model."
        )
    paths = {name: own_names[name] for name in translated.layers}
    return replace(translated, metadata=translated.metadata | {adapter_file.PATHS_KEY: json.dumps(paths)})


def _refuse_unknown_base(stored: AdapterFile) -> None:
    for name, parts in stored.layers.items():
        if TRAINED_KEYS[0] in parts and BASE_KEYS[0] not in parts:
            raise AdapterError(
                f"{stored.path}: {printable(name)} has no base factors; they come from the base model's "
                "weights. Export the file first with `simpletuner export FILE --output OUT --model MODEL`."
            )


def _shape_of(path: str, layer: StoredLayer, *, file: Path) -> tuple[int, ...]:
    """Shape of the weight that a layer's factors are of.

    Raises:
        AdapterError: They are of different ranks.
    """
    axes = zip((*VANILLA_KEYS, *TRAINED_KEYS, *BASE_KEYS), (0, 1, 0, 1, -1, 0, 1, -1), strict=True)
    ranks = {layer.tensors[key].shape[axis] for key, axis in axes if key in layer.tensors}
    if len(ranks) > 1:
        found = " and ".join(map(str, sorted(ranks)))
        raise AdapterError(f"{file}: the factors of {path} have ranks {found}. The file is damaged.")
    a, b = layer.factors_at(1)
    return b.shape[0], *a.shape[1:]


def _checked(
    shapes: Mapping[str, tuple[int, ...]], source: Source, denoiser: nn.Module, *, file: Path
) -> dict[str, tuple[int, ...]]:
    """The shapes of the denoiser's weights, which the file's factors must have."""
    own = {path: _weight_shape(module) for path, module in denoiser.named_modules()}
    found = {}
    for path in (*source.layers, *source.renamed):
        expected = own.get(path)
        if expected is None:
            raise AdapterError(f"{file}: {path} is no layer of this {type(denoiser).__name__}.")
        if path in shapes and shapes[path] != expected:
            raise AdapterError(
                f"{file}: {path} is for a weight of {_size(shapes[path])}; the model's is {_size(expected)}. "
                "Give its base model."
            )
        found[path] = expected
    return found


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return None if weight is None else tuple(weight.shape)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def refuse_other_shapes(opened: Sequence[Opened]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the layer's weight in all files.

    Raises:
        AdapterError: Two files adapt weights of different shapes.
    """
    first: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for each in opened:
        for path, shape in each.shapes.items():
            file, expected = first.setdefault(path, (each.file, shape))
            if shape != expected:
                raise AdapterError(
                    f"{path} is for a weight of {_size(expected)} in {file}, of {_size(shape)} in "
                    f"{each.file}. The files are for different models."
                )
    return {path: shape for path, (_, shape) in first.items()}


def _hashes(opened: Opened) -> dict[str, str]:
    return json.loads(opened.source.metadata.get(adapter_file.HASH_KEY, "{}"))  # type: ignore[no-any-return]


def _joined_words(texts: Iterable[str]) -> str:
    words = (word.strip() for text in texts for word in text.split(","))
    return ", ".join(dict.fromkeys(word for word in words if word))
