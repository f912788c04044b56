"""A denoiser's folder as one file with the layer names of the original checkpoint.

Shapes: O rows (out features) of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.contracts import FusedSlice, ModelSpec
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.new_files import refuse_existing
from simpletuner.helpers.io.safetensors_file import read_metadata, save_tensors
from simpletuner.helpers.models.denoiser_weights import find_denoiser
from simpletuner.helpers.models.single_file import DENOISER_PREFIX, SUFFIX

_RMS_NORMS = (".query_norm", ".key_norm")
"""Ends of layer names whose weight is called scale in the original."""


def original_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """A denoiser's tensors by their names in the original checkpoint, joined where that joins layers.

    Raises:
        ModelError: The family has no original names, or a tensor has none or is missing.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    numbers: dict[str, int] = {}
    for name, tensor in tensors.items():
        place, key = _place(name, spec)
        numbers[key] = place.num_pieces
        parts = tensor.chunk(len(place.pieces))  # [O / pieces, ...]
        pieces.setdefault(key, {}).update(zip(place.pieces, parts, strict=True))
    incomplete = [key for key, number in numbers.items() if len(pieces[key]) != number]
    if incomplete:
        raise ModelError(f"{len(incomplete)} layers lack rows, first {incomplete[0]}. Give a whole denoiser.")
    return {key: torch.cat([rows[index] for index in sorted(rows)]) for key, rows in pieces.items()}


def export_model(folder: Path, output: Path, *, dtype: torch.dtype | None, overwrite: bool) -> int:
    """Write the denoiser in a folder of diffusers' layout as one file, which ComfyUI's tools read.

    Args:
        folder: With the configuration and the weights.
        output: The file.
        dtype: Of the tensors; None keeps that of the folder.
        overwrite: Replace a file that exists.

    Returns:
        Number of tensors.

    Raises:
        ModelError: It is no denoiser of a known family, or its layers have no original names.
        StorageError: The file cannot be written, or exists.
    """
    refuse_existing([output], overwrite=overwrite)
    spec = find_denoiser(str(folder), option="MODEL").spec
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise ModelError(f"{folder} has no {SUFFIX} file. Give the folder of a denoiser.")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    prefix = DENOISER_PREFIX if spec.denoiser_name == "unet" else ""
    named = {f"{prefix}{name}": tensor for name, tensor in original_tensors(tensors, spec).items()}
    named = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in named.items()}
    metadata = read_metadata(files[0], error=ModelError) | {"format": "pt"}
    partial = output.with_name(f".{output.name}.partial")
    try:
        save_tensors(named, partial, metadata=metadata)
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{output} cannot be written: {error}. Choose another --output.") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(named)


def _place(name: str, spec: ModelSpec) -> tuple[FusedSlice, str]:
    """Where a tensor stands in the original checkpoint, and the name of the tensor there."""
    path, _, leaf = name.rpartition(".")
    if spec.original_name is None:
        raise ModelError(f"{spec.name} has no layer names of an original checkpoint here.")
    try:
        found = spec.original_name(path)
    except ValueError as error:
        raise ModelError(f"{error}, so it has no name in the original checkpoint.") from error
    place = FusedSlice(found) if isinstance(found, str) else found
    return place, f"{place.name}.{'scale' if place.name.endswith(_RMS_NORMS) else leaf}"
