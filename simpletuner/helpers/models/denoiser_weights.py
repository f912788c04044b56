"""A model's denoiser without loading it: family and layers by its configuration, weights one at a time.

Shapes: O rows (out features) of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.helpers.contracts import FusedSlice, ModelSpec
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.safetensors_file import open_safetensors
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.loading import (
    Component,
    ModelSource,
    class_of,
    find_component,
    read_config,
    search,
)
from simpletuner.helpers.models.single_file import DENOISER_PREFIX, SUFFIX, SingleFile, refuse_quantised

CONFIG = "config.json"
TEXT_PREFIXES = ("conditioner.", "cond_stage_model.", "text_encoders.")
"""Of text encoders in single files."""


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The denoiser of a model, by its configuration."""

    family: str
    spec: ModelSpec
    component: Component
    """Without weights."""
    subfolder: str
    """Folder of the denoiser in the model; "" for the model's own folder."""

    def on_meta(self) -> nn.Module:
        """The denoiser with its layers' names and shapes, and without weights.

        Raises:
            ModelError: Its class does not know the configuration.
        """
        denoiser_class: Any = registry.load_family(self.family).denoiser_class
        try:
            with torch.device("meta"):
                module: nn.Module = denoiser_class.from_config(dict(self.component.config))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"{self.component.source}: {self.component.folder} is no configuration of "
                f"{denoiser_class.__name__}: {error}."
            ) from error
        return module


def find_denoiser(where: str, *, option: str) -> Denoiser:
    """Find the configuration of a model's denoiser, whose class tells the family.

    Args:
        where: Folder or repository, of a model in the diffusers layout or of its denoiser alone.
        option: Command-line option that names it, for messages.

    Raises:
        ModelError: There is no configuration, or it is of no known family.
    """
    source, specs = ModelSource(where, key=option), registry.specs()
    if Path(where).is_file():
        raise ModelError(f"{source} is a file, which has no configuration. Give a folder or a repository.")
    folders = (*dict.fromkeys(spec.denoiser_name for spec in specs.values()), "")

    def look(root: Path) -> Path | None:
        return next((folder for name in folders if ((folder := root / name) / CONFIG).is_file()), None)

    patterns = [f"{name}/{CONFIG}" if name else CONFIG for name in folders]
    root, folder = search(source, patterns, look=look)
    if folder is None:
        raise ModelError(f"{source}: no {' or '.join(patterns)}. Give a model in the diffusers layout.")
    found = class_of(read_config(folder / CONFIG))
    classes = {name: registry.load_family(name).denoiser_class.__name__ for name in specs}
    family = next((name for name, class_name in classes.items() if class_name == found), None)
    if family is None:
        known = ", ".join(f"{class_name} ({name})" for name, class_name in classes.items())
        raise ModelError(f"{source}: {folder} is {found}. Known denoisers: {known}.")
    spec, subfolder = specs[family], "" if folder == root else folder.name
    component = find_component(
        spec.denoiser_name, source, component_type="configuration", subfolder=subfolder
    )
    return Denoiser(family, spec, component, subfolder)


def with_weights(denoiser: Denoiser, where: str, *, option: str) -> Component:
    """The component with the weights of a folder, a repository or a single file.

    Args:
        denoiser: Found in `where`, or in another model of the same architecture for a single file.
        where: The model.
        option: Command-line option that names it, for messages.

    Raises:
        ModelError: A file is missing, or the repository is unreachable.
    """
    source, path = ModelSource(where, key=option), Path(where)
    if source.is_file:
        weights = SingleFile(path, DENOISER_PREFIX)
        return replace(denoiser.component, source=source, files=(path,), commit=None, single_file=weights)
    return find_component(
        denoiser.spec.denoiser_name, source, component_type="diffusers", subfolder=denoiser.subfolder
    )


@contextmanager
def weight_reader(
    component: Component, denoiser: nn.Module, *, spec: ModelSpec
) -> Iterator[Callable[[str], Tensor | None]]:
    """Read weights by their names in diffusers' layout, one at a time; None for a name that is not known.

    Args:
        component: The denoiser with its weights.
        denoiser: The same on meta.
        spec: The family, whose names of the original checkpoint a single file may have.

    Raises:
        ModelError: A file is damaged, or its weights are quantised.
    """
    with ExitStack() as stack:
        opened = [
            stack.enter_context(open_safetensors(file, error=ModelError))
            for file in component.files
            if file.suffix == SUFFIX
        ]
        keys = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  not a mapping
        prefix = "" if component.single_file is None else component.single_file.prefix
        if any(key.startswith(prefix) for key in keys):
            keys = {key: file for key, file in keys.items() if key.startswith(prefix)}
        else:
            prefix = ""
        for key, file in keys.items():
            refuse_quantised(file, key, path=component.files[0])
        names = _places(denoiser, {key.removeprefix(prefix) for key in keys}, spec=spec)

        def read(name: str) -> Tensor | None:
            place = names.get(name)
            if place is None:
                return None
            key = f"{prefix}{place.name}"
            tensor: Tensor = keys[key].get_tensor(key)
            return _rows(tensor, place)

        yield read


def text_tensors(where: str) -> dict[str, dict[str, tuple[Path, str]]]:
    """Text encoder -> name of a tensor -> (file, key), of a local model; {} for one without any.

    In a single file everything outside the denoiser and the VAE counts as one.
    """
    path = Path(where)
    if path.is_file():
        with open_safetensors(path, error=ModelError) as file:
            own = [key for key in file.keys() if key.startswith(TEXT_PREFIXES)]  # noqa: SIM118
        return {"text encoders": {key: (path, key) for key in own}} if own else {}
    found: dict[str, dict[str, tuple[Path, str]]] = {}
    for folder in sorted(path.glob("text_encoder*")):
        for each in sorted(folder.glob(f"*{SUFFIX}")):
            with open_safetensors(each, error=ModelError) as file:
                found.setdefault(folder.name, {}).update({key: (each, key) for key in file.keys()})  # noqa: SIM118
    return found


def differing_text_encoders(base: str, tuned: str) -> list[str] | None:
    """Names of the text encoders whose tensors differ; None where the models cannot be compared."""
    first, second = text_tensors(base), text_tensors(tuned)
    if not first or not second:
        return None if first or second else []
    if first.keys() != second.keys():
        return None
    return [name for name in first if not _are_equal(first[name], second[name])]


def _are_equal(first: Mapping[str, tuple[Path, str]], second: Mapping[str, tuple[Path, str]]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(_read(*first[name]), _read(*second[name])) for name in first
    )


def _read(file: Path, key: str) -> Tensor:
    with open_safetensors(file, error=ModelError) as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor.double()


def _places(denoiser: nn.Module, keys: set[str], *, spec: ModelSpec) -> dict[str, FusedSlice]:
    """Name of a weight in diffusers -> its key, with its rows of a joined layer in the original layout."""
    own = dict(denoiser.named_parameters())
    if keys >= own.keys():
        return {name: FusedSlice(name) for name in own}
    places = {}
    for name in own:
        path, _, leaf = name.rpartition(".")
        place = _original(path, spec)
        if place is not None and f"{place.name}.{leaf}" in keys:
            places[name] = replace(place, name=f"{place.name}.{leaf}")
        elif name in keys:
            places[name] = FusedSlice(name)
    return places


def _original(path: str, spec: ModelSpec) -> FusedSlice | None:
    try:
        rows = None if spec.original_name is None else spec.original_name(path)
    except ValueError:
        return None
    return FusedSlice(rows) if isinstance(rows, str) else rows


def _rows(tensor: Tensor, place: FusedSlice) -> Tensor:
    if place.num_pieces == 1:
        return tensor
    if tensor.shape[0] % place.num_pieces:
        raise ModelError(
            f"{place.name} has {tensor.shape[0]} rows, which are not {place.num_pieces} equal pieces. Give a "
            "model of this architecture."
        )
    pieces = tensor.reshape(place.num_pieces, -1, *tensor.shape[1:])
    return pieces[list(place.pieces)].flatten(0, 1)
