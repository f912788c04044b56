"""Loads weights from a single .safetensors file, in diffusers' or the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import xxhash
from diffusers import UNet2DConditionModel
from diffusers.loaders import FromOriginalModelMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from torch import Tensor, nn

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.names import one_line_reason
from simpletuner.helpers.io.safetensors_file import open_safetensors

Model = TypeVar("Model", bound=nn.Module)

SUFFIX = ".safetensors"
DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
PACKED_DTYPES = frozenset({"U8", "I8"})
SCALE_NAMES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scaled_fp8", "comfy_quant")
"""Last parts of the names of the scales of quantised weights."""
MAX_SHOWN = 80
"""Characters of a tensor's name in a message; a damaged file can hold a name of megabytes."""
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class SingleFile:
    """One model in a file."""

    path: Path
    prefix: str
    """Prefix of the model's tensors in the original layout; a file with one model may omit it."""

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, without the prefix; all tensors if none has the prefix.

        Raises:
            ModelError: The file is unreadable, or its weights are quantised.
        """
        with open_safetensors(self.path, error=ModelError) as file:
            names = list(file.keys())
            own = [name for name in names if name.startswith(self.prefix)] or names
            for name in own:
                refuse_quantised(file, name, path=self.path)
            return {name.removeprefix(self.prefix): file.get_tensor(name) for name in own}


def refuse_quantised(file: Any, name: str, *, path: Path) -> None:
    """Check that a tensor of an open file is no quantised weight.

    Raises:
        ModelError: It is one, or the scale of one.
    """
    packed = file.get_slice(name).get_dtype() in PACKED_DTYPES
    if packed or name.rpartition(".")[2] in SCALE_NAMES:
        raise ModelError(
            f"{path}: the weights are quantised ({name[:MAX_SHOWN]!r}). Give the model in bf16 or fp16; "
            "base_model_precision quantises it."
        )


def names_in(path: Path) -> frozenset[str]:
    """Names of a file's tensors.

    Raises:
        ModelError: It is no safetensors file.
    """
    with open_safetensors(path, error=ModelError) as file:
        return frozenset(file.keys())


def load_single_file(
    model_class: type[Model], file: SingleFile, *, folder: Path, dtype: torch.dtype
) -> Model:
    """Load a diffusers model or a CLIP text encoder with the weights of a file, in eval mode.

    Args:
        model_class: Class of diffusers, or CLIP text encoder of transformers.
        file: The weights.
        folder: Folder of the configuration.
        dtype: Dtype of the model.

    Raises:
        ModelError: The file is damaged, incomplete, or of another architecture.
    """
    tensors = file.tensors()
    loader: Any = model_class
    try:
        if issubclass(model_class, FromOriginalModelMixin):
            named = _named_for(model_class, tensors, folder=folder, prefix=file.prefix)
            options = {"config": str(folder), "dtype": dtype, "local_files_only": True}
            model: Any = loader.from_single_file(named, **options)
        else:
            model = create_diffusers_clip_model_from_ldm(
                model_class,
                checkpoint=_prefixed(tensors, file.prefix),
                config=str(folder),
                torch_dtype=dtype,
                local_files_only=True,
            )
    # The converter reads tensors without checking that the file has them.
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
        raise ModelError(
            f"{file.path} cannot be loaded as {model_class.__name__} with the configuration in {folder}: "
            f"{type(error).__name__}: {one_line_reason(error)}. Give this model's configuration, or another "
            "file."
        ) from error
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{file.path} lacks {len(missing)} of the weights of {model_class.__name__}, for instance "
            f"{missing[0]}. Give a complete file."
        )
    # The converter ignores unknown tensors. A file may hold more than the VAE or the text encoder, so only
    # the denoiser's size is checked.
    surplus = _num_weights(tensors) - _num_weights(model.state_dict())
    if file.prefix == DENOISER_PREFIX and surplus > 0:
        raise ModelError(
            f"{file.path} has {surplus} weights more than {model_class.__name__} with the configuration in "
            f"{folder}. Give this model's configuration, or another file."
        )
    return cast(Model, model.eval())


@cache
def cached_file_digest(path: Path, size: int, modified_ns: int) -> str:
    """Hash of a file's bytes, computed once for all its components while size and time stay the same."""
    digest = xxhash.xxh3_128()
    hash_file(path, digest)
    return digest.hexdigest()


def hash_file(path: Path, digest: xxhash.xxh3_128) -> None:
    """Add a file's bytes to a digest."""
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)


def _named_for(
    model_class: Any, tensors: Mapping[str, Tensor], *, folder: Path, prefix: str
) -> Mapping[str, Tensor]:
    """The tensors in the names that diffusers' loader reads: its own, or the original ones.

    Those of a UNet need the prefix; converters of transformers take none, and some do not know it.
    """
    with torch.device("meta"):
        own = model_class.from_config(model_class.load_config(str(folder))).state_dict().keys()
    if own <= tensors.keys():
        return {name: tensors[name] for name in own}
    if prefix == DENOISER_PREFIX and not issubclass(model_class, UNet2DConditionModel):
        return tensors
    return _prefixed(tensors, prefix)


def _num_weights(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
