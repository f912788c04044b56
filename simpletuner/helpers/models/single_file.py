"""Weights from one .safetensors file, in diffusers' names or the original ones, which diffusers converts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from torch import Tensor, nn

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.safetensors_file import open_safetensors

SUFFIX = ".safetensors"
DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
PACKED_DTYPES = frozenset({"U8", "I8"})
SCALE_NAMES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scaled_fp8", "comfy_quant")
"""Last parts of the names of what quantised weights would have to be multiplied by."""
MAX_SHOWN = 80
"""Characters of a tensor's name in a message; a name may be as long as the header."""
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class SingleFile:
    """The part of a file that holds one model."""

    path: Path
    prefix: str
    """Of the model's tensors in a file of the original layout; a file of the model alone may go without."""

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, without the prefix; all there are when none has it.

        Raises:
            ModelError: The file cannot be read, or its weights are quantised.
        """
        with open_safetensors(self.path, error=ModelError) as file:
            names = list(file.keys())
            own = [name for name in names if name.startswith(self.prefix)] or names
            for name in own:
                packed = file.get_slice(name).get_dtype() in PACKED_DTYPES
                if packed or name.rpartition(".")[2] in SCALE_NAMES:
                    raise ModelError(
                        f"{self.path}: its weights are quantised ({name[:MAX_SHOWN]!r}). Give the model in "
                        "bf16 or fp16; base_model_precision quantises it here."
                    )
            return {name.removeprefix(self.prefix): file.get_tensor(name) for name in own}


def names_in(path: Path) -> frozenset[str]:
    """The names of a file's tensors.

    Raises:
        ModelError: It is no safetensors file.
    """
    with open_safetensors(path, error=ModelError) as file:
        return frozenset(file.keys())


def load_single_file(model_class: Any, file: SingleFile, *, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A diffusers model or CLIP text encoder with the weights of a file, in eval mode.

    Args:
        model_class: Of diffusers, or a CLIP text encoder of transformers.
        file: Has the weights.
        folder: Has the configuration.
        dtype: Of the model.

    Raises:
        ModelError: The file is damaged, incomplete, or of another architecture.
    """
    tensors = file.tensors()
    try:
        if issubclass(model_class, FromOriginalModelMixin):
            named = _named_for(model_class, tensors, folder=folder, prefix=file.prefix)
            options = {"config": str(folder), "dtype": dtype, "local_files_only": True}
            model = model_class.from_single_file(named, **options)
        else:
            model = create_diffusers_clip_model_from_ldm(
                model_class,
                checkpoint=_prefixed(tensors, file.prefix),
                config=str(folder),
                torch_dtype=dtype,
                local_files_only=True,
            )
    # The converter reads what it expects without asking whether it is there.
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        SafetensorError,
        SingleFileComponentError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{file.path}: cannot be loaded as {model_class.__name__} of the shape that {folder} states: "
            f"{type(error).__name__}: {reason}. Give the configuration of this very model, or another file."
        ) from error
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{file.path}: lacks {len(missing)} of the weights of {model_class.__name__}, for instance "
            f"{missing[0]}. Give a complete file."
        )
    # The converter passes over what it has no place for; beside a VAE or a text encoder there may be more.
    surplus = _num_weights(tensors) - _num_weights(model.state_dict())
    if file.prefix == DENOISER_PREFIX and surplus > 0:
        raise ModelError(
            f"{file.path}: has {surplus} weights more than {model_class.__name__} of the shape that {folder} "
            "states. Give the configuration of this very model, or another file."
        )
    return model.eval()  # type: ignore[no-any-return]


@cache
def content_digest(path: Path, size: int, modified_ns: int) -> str:
    """Hash of a file's bytes, read once for all the components in it while size and time stay the same."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _named_for(
    model_class: Any, tensors: Mapping[str, Tensor], *, folder: Path, prefix: str
) -> Mapping[str, Tensor]:
    """The tensors as diffusers' loader recognises them: its own names alone, or the original ones in full."""
    with torch.device("meta"):
        own = model_class.from_config(model_class.load_config(str(folder))).state_dict().keys()
    if own <= tensors.keys():
        return {name: tensors[name] for name in own}
    return _prefixed(tensors, prefix)


def _num_weights(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
