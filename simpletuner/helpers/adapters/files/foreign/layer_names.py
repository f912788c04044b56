"""Names that a denoiser's layers have in the files of other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from simpletuner.helpers.adapters.files.adapter_file import layer_name
from simpletuner.helpers.contracts import FusedSlice, ModelSpec

# By name, as choices are: families are in a layer above.
REGISTRY = "simpletuner.helpers.models.registry"


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the denoiser, and its rows of the file's layer; all of them by default."""

    path: str
    """Path in the denoiser, with dots."""
    pieces: tuple[int, ...] = (0,)
    """As in FusedSlice."""
    num_pieces: int = 1

    @property
    def own_name(self) -> str:
        """Name of the layer in LyCORIS's key layout."""
        return layer_name(self.path)


def targets_by_name(denoiser: nn.Module) -> Mapping[str, Sequence[Target]]:
    """Name with underscores -> the layers that it stands for: of diffusers, and of the original checkpoint.

    OneTrainer numbers the parts of a joined layer: its "qkv.0" is one layer of its own.
    """
    paths = [path for path, _ in denoiser.named_modules() if path]
    originals = _originals(paths)
    parts: dict[str, list[Target]] = {}
    for path, rows in originals.items():
        parts.setdefault(rows.name, []).append(Target(path, rows.pieces, rows.num_pieces))
    names: dict[str, list[Target]] = {}
    for name, group in parts.items():
        group.sort(key=lambda target: target.pieces)
        names[_flat(name)] = group
        if len(group) > 1:
            names |= {_flat(f"{name}.{index}"): [Target(part.path)] for index, part in enumerate(group)}
    return names | {_flat(path): [Target(path)] for path in paths}


def find(names: Mapping[str, Sequence[Target]], name: str) -> Sequence[Target]:
    """The layers that a name stands for; none for an unknown one."""
    flat = _flat(name)
    # OneTrainer writes "img_in.proj" for the original "img_in".
    return names.get(flat) or names.get(flat.removesuffix("_proj"), ())


def _originals(paths: Sequence[str]) -> Mapping[str, FusedSlice]:
    """Path -> original name, by the family that names the most of these paths."""
    specs: Mapping[str, ModelSpec] = import_module(REGISTRY).specs()
    named = [_named(spec, paths) for spec in specs.values()]
    return max(named, key=len, default={})


def _named(spec: ModelSpec, paths: Sequence[str]) -> dict[str, FusedSlice]:
    names: dict[str, FusedSlice] = {}
    for path in paths if spec.original_name is not None else ():
        try:
            rows = spec.original_name(path)  # type: ignore[misc]  # not None here
        except ValueError:
            continue
        names[path] = FusedSlice(rows) if isinstance(rows, str) else rows
    return names


def _flat(name: str) -> str:
    return name.replace(".", "_")
