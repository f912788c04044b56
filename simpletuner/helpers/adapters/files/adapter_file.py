"""Adapter files: safetensors with the schedule and the training's metadata in the header."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import labels
from simpletuner.helpers.adapters.files.comfyui import EMBEDDING_KEYS
from simpletuner.helpers.adapters.quantised import is_quantized
from simpletuner.helpers.adapters.tlora import rank_schedule
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.atomic import write_chunks
from simpletuner.helpers.io.safetensors_file import METADATA, header_bytes, open_safetensors, places_of
from simpletuner.helpers.io.tensor_bytes import on_host, parts_of

logger = logging.getLogger(__name__)

SCHEDULE_KEY = rank_schedule.SCHEDULE_KEY
LYCORIS_KEY = "lycoris_config"
METADATA_KEY = "lora_adapter_metadata"  # PEFT's configuration, which diffusers reads and writes
HASH_KEY = "base_weights_hash"
VERSION_KEY, VERSION = "format_version", "2"  # since 2 the tensors alone carry the scale
MULTIPLIER_KEY = "saved_multiplier"  # multiplier of the training, which the tensors contain
PATHS_KEY = "module_paths"  # layer name -> path with dots; the name has underscores for both
OPTIONS_KEY = "layer_options"  # option that tensors do not show -> names of the layers that have it
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
# One value each, also of an integer dtype; the last are of another program's T-LoRA.
SCALARS = (".alpha", ".on_input", ".tlora_alpha", ".tlora_current_rank", ".tlora_min_rank", ".tlora_max_rank")
MATRICES = ("q_layer.weight", "p_layer.weight", "down.weight", "up.weight", "base_q", "base_p")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LAYER_PREFIX = "lycoris_"
NUM_HASHED = 4096  # values of a layer


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The tensors of an adapter file, and the entries of its header."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def is_peft(self) -> bool:
        """Whether it is a LoRA in diffusers' format."""
        return any(".lora_A." in key for key in self.tensors)

    @property
    def multiplier(self) -> float:
        """`multiplier` of the header's lycoris json: 1 since format_version 2, and in a file without one.

        Raises:
            AdapterError: It is no finite number.
        """
        value = (self.entry(LYCORIS_KEY) or {}).get("multiplier", 1.0)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{self.path}: multiplier in its header is {value!r}, no finite number.")
        return float(value)

    @property
    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Layer name -> its tensors under their keys without that name."""
        return by_layer(self.tensors)

    def entry(self, key: str) -> dict[str, Any] | None:
        """A JSON object in the header; None in a file without it.

        Raises:
            AdapterError: The entry is not JSON, or no object.
        """
        if key not in self.metadata:
            return None
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{self.path}: {key} in its header is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise AdapterError(
                f"{self.path}: {key} in its header is a {type(value).__name__}, not an object."
            )
        return value


def layer_name(path: str) -> str:
    """Name of a layer in LyCORIS's key layout, by its path in the denoiser."""
    return f"{LAYER_PREFIX}{path}".replace(".", "_")


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors in LyCORIS's key layout by the layer's name, under the rest of their keys."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, {})[part] = tensor
    return layers


def read(path: Path, *, takes_embeddings: bool = False) -> AdapterFile:
    """Read an adapter file into memory.

    Args:
        path: The file.
        takes_embeddings: Read also the file of a new token, which holds no adapter.

    Raises:
        AdapterError: The file is missing, empty or no safetensors file, or a tensor is not finite or of no
            floating-point dtype.
    """
    _refuse_other_files(path)
    with open_safetensors(path, error=AdapterError) as opened:
        metadata = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a mapping
    if not tensors:
        raise AdapterError(f"{path}: the file has no tensors.")
    if set(tensors) <= set(EMBEDDING_KEYS) and not takes_embeddings:
        raise AdapterError(
            f"{path}: the file has the embeddings of a new token and no adapter. simpletuner sample takes "
            "it; here give an adapter file."
        )
    _refuse_malformed(path, tensors)
    _refuse_non_finite(path, tensors)
    file = AdapterFile(path=path, tensors=tensors, metadata=metadata)
    for key in (SCHEDULE_KEY, LYCORIS_KEY, HASH_KEY, PATHS_KEY, OPTIONS_KEY):
        file.entry(key)  # an invalid entry is refused before anything is attached
    return file


def _refuse_malformed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if not key.isprintable() or "/" in key or "\\" in key:
            raise AdapterError(f"{path}: {key[:80]!a} is no valid name of a tensor.")
        is_scalar = key.endswith(SCALARS)
        if is_scalar and tensor.numel() != 1:
            raise AdapterError(f"{path}: {key} has {tensor.numel()} values instead of one.")
        if tensor.dtype not in (*DTYPES, *(INTEGERS if is_scalar else ())):
            found, allowed = str(tensor.dtype), ", ".join(map(str, DTYPES))
            raise AdapterError(f"{path}: {key} has dtype {found}. Allowed: {allowed}.")
        if tensor.numel() == 0 or (tensor.ndim < 2 and key.endswith(MATRICES)):
            raise AdapterError(f"{path}: {key} has shape {shape}, which is invalid for a factor.")


def _refuse_other_files(path: Path) -> None:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise AdapterError(f"{path}: {what}. Give the path of a .safetensors file.")
    if path.suffix in PICKLED:
        raise AdapterError(
            f"{path}: {path.suffix} files are pickles, which can run code, so they are never opened. Convert "
            "it to safetensors with a tool that you trust."
        )


def write(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write an adapter file atomically; equal content gives equal bytes.

    Raises:
        AdapterError: A tensor has a value that is not finite.
        StorageError: The file cannot be written.
    """
    _refuse_non_finite(path, tensors)
    parts = parts_of({key: on_host(tensor) for key, tensor in tensors.items()})
    chunks = [data for *_, data in parts]
    texts = {"format": "pt"} | dict(metadata)
    if labels.SPECIFICATION in metadata:
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        texts[labels.HASH] = f"0x{digest.hexdigest()}"
    write_chunks(path, [header_bytes({METADATA: texts} | places_of(parts)), *chunks])


def weight_hash(weight: Tensor) -> str:
    """Hash of a layer's base weight: 4,096 evenly spaced values, rounded to bf16."""
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, min(NUM_HASHED, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].to(torch.bfloat16).cpu().contiguous()
    return xxhash.xxh3_64_hexdigest(values.view(torch.int16).numpy().tobytes())


def base_hashes(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layer name -> hash of its base weight, without layers on meta and quantised ones."""
    weights = {name: cast(Tensor, layer.weight) for name, layer in layers.items()}
    return {
        name: weight_hash(weight)
        for name, weight in weights.items()
        if not weight.is_meta and not is_quantized(weight)
    }


def warn_about_other_base(file: AdapterFile, here: Mapping[str, str]) -> None:
    """Warn if the model's `base_hashes` differ from those in the file."""
    stored = file.entry(HASH_KEY) or {}
    shared = [name for name in here if name in stored]
    differing = [name for name in shared if stored[name] != here[name]]
    if differing:
        logger.warning(
            "%s was trained on other base weights (%s): %d of %d layers differ. Load it into its base model.",
            file.path.name,
            file.metadata.get("base_model", "unknown"),
            len(differing),
            len(shared),
        )


def _refuse_non_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise AdapterError(f"{path}: {key} has a value that is not finite. The adapter is unusable.")


def _is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite in float32."""
    # A sum with a value that is not finite is not finite, and one pass; finite values may overflow in it.
    if bool(tensor.sum(dtype=torch.float32).isfinite()):
        return True
    return bool(tensor.float().isfinite().all())
