"""Adapter files: safetensors with what is needed to use them again in the header."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from simpletuner.helpers.adapters.quantised import is_quantized
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.atomic import write_bytes

logger = logging.getLogger(__name__)

SCHEDULE_KEY = "tlora_config"
LYCORIS_KEY = "lycoris_config"
HASH_KEY = "base_weights_hash"
PATHS_KEY = "module_paths"  # layer name -> path with dots, which underscores cannot be turned back into
MAX_HEADER_BYTES = 1 << 24  # twenty times what every layer of the largest model here needs
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
SCALARS = (".alpha", ".on_input")  # single ones, which may be whole
MATRICES = ("q_layer.weight", "p_layer.weight", "down.weight", "up.weight", "base_q", "base_p")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NUM_HASHED = 4096  # evenly spaced values of a layer


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The tensors of an adapter file, and the text in its header."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def is_peft(self) -> bool:
        """Whether it is a LoRA in diffusers' format."""
        return any(".lora_A." in key for key in self.tensors)

    @property
    def multiplier(self) -> float:
        """Strength that the json it was trained with gives the adapter; 1 in a file without that json.

        Raises:
            AdapterError: It is no finite number.
        """
        value = (self.entry(LYCORIS_KEY) or {}).get("multiplier", 1.0)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{self.path}: the header's multiplier is {value!r}, no finite number.")
        return float(value)

    def entry(self, key: str) -> dict[str, Any] | None:
        """A header entry that holds JSON; None in a file without it.

        Raises:
            AdapterError: The entry is not JSON, or no object.
        """
        if key not in self.metadata:
            return None
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{self.path}: the header's {key} is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise AdapterError(f"{self.path}: the header's {key} is {type(value).__name__}, not an object.")
        return value


def read(path: Path) -> AdapterFile:
    """Read an adapter file whole.

    Raises:
        AdapterError: The file is missing, empty, no safetensors file, or holds a value that is not finite or
            no floating-point number.
    """
    _refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a readable safetensors file: {error}. Copy or download it again."
        ) from error
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors, so there is no adapter in it.")
    _refuse_malformed(path, tensors)
    _refuse_non_finite(path, tensors)
    file = AdapterFile(path=path, tensors=tensors, metadata=metadata)
    for key in (SCHEDULE_KEY, LYCORIS_KEY, HASH_KEY, PATHS_KEY):
        file.entry(key)  # whatever cannot be read is told before anything is attached
    return file


def _refuse_malformed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not key.isprintable() or "/" in key or "\\" in key:
            raise AdapterError(f"{path}: {key[:80]!a} is no name of an adapter's tensor.")
        is_scalar = key.endswith(SCALARS)
        if is_scalar and tensor.numel() != 1:
            raise AdapterError(f"{path}: {key} holds {tensor.numel()} values, not one.")
        if tensor.dtype not in (*DTYPES, *(INTEGERS if is_scalar else ())):
            found, allowed = str(tensor.dtype), ", ".join(map(str, DTYPES))
            raise AdapterError(f"{path}: {key} is {found}; the factors of an adapter are {allowed}.")
        if tensor.numel() == 0 or (tensor.ndim < 2 and key.endswith(MATRICES)):
            raise AdapterError(f"{path}: {key} has the shape {shape}, which no factor of an adapter has.")


def _refuse_unreadable(path: Path) -> None:
    """Refuse, before it is read, what is no safetensors file or has a header that would fill the memory."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise AdapterError(f"{path}: {what}. Give the path of an adapter's .safetensors file.")
    if path.suffix in PICKLED:
        raise AdapterError(
            f"{path}: {path.suffix} files are pickles, which can run code, and are never opened. Convert it "
            "to safetensors with a tool that you trust."
        )
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{path}: its header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read. It is no "
            "safetensors file, or not one of an adapter."
        )


def write(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write an adapter file, whole or not at all; equal content gives equal bytes.

    Raises:
        AdapterError: A tensor holds a value that is not finite.
        StorageError: The file cannot be written.
    """
    _refuse_non_finite(path, tensors)
    own = {key: tensors[key].detach().cpu().clone().contiguous() for key in sorted(tensors)}
    write_bytes(path, _with_sorted_header(save(own, metadata={"format": "pt"} | dict(metadata))))


def weight_hash(weight: Tensor) -> str:
    """Identity of a layer's base weight: 4,096 evenly spaced values, rounded to bf16."""
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(NUM_HASHED, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].to(torch.bfloat16).cpu().contiguous()
    return xxhash.xxh3_64_hexdigest(values.view(torch.int16).numpy().tobytes())


def base_hashes(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer name -> identity of its base weight; layers without data (meta) or packed ones are left out."""
    weights = {name: cast(Tensor, layer.weight) for name, layer in layers.items()}
    return {
        name: weight_hash(weight)
        for name, weight in weights.items()
        if not weight.is_meta and not is_quantized(weight)
    }


def warn_about_other_base(file: AdapterFile, here: Mapping[str, str]) -> None:
    """Say so when the model's `base_hashes` are not those of the weights that the adapter was trained on."""
    stored = file.entry(HASH_KEY) or {}
    shared = [name for name in here if name in stored]
    differing = [name for name in shared if stored[name] != here[name]]
    if differing:
        logger.warning(
            "%s was trained on other base weights (%s): %d of %d layers differ here. The result may be off.",
            file.path.name,
            file.metadata.get("base_model", "not stated"),
            len(differing),
            len(shared),
        )


def _with_sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header's keys in order, which the library writes in any order."""
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[start:]))


def _refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{path}: {key} holds a value that is not finite. The adapter is not usable.")
