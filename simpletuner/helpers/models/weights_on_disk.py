"""What a model's files say before it is loaded: size, scheduler, markers. Imports no torch, asks no hub."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.model_source import FILE_SUFFIX
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.safetensors_file import read_header

DENOISER_PREFIX = "model.diffusion_model."
VELOCITY_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Names of empty tensors in a single file: v-prediction, and a schedule with zero terminal SNR."""


def num_denoiser_weights(model: ModelConfig, spec: ModelSpec) -> int | None:
    """Number of the denoiser's weights: from its files, else the published number; None if unknown.

    Raises:
        ModelError: A file is no safetensors file.
    """
    swapped = model.pretrained_unet_model_name_or_path or model.pretrained_transformer_model_name_or_path
    source = Path(swapped or model.pretrained_model_name_or_path)
    if source.exists():
        return sum(_numbers_of_values(source, spec)) or None
    flavours = {repository: name for name, repository in spec.flavours.items()}
    return spec.num_weights.get(flavours.get(str(source), ""))


def num_weights_in(folder: Path) -> int | None:
    """Number of the weights in a component's folder; None if it has no safetensors files.

    Raises:
        ModelError: A file is no safetensors file.
    """
    return sum(_numbers_in(sorted(folder.glob(f"*{FILE_SUFFIX}")), prefix="")) or None


def scheduler_config(model: ModelConfig) -> Mapping[str, object] | None:
    """Configuration of a local model's scheduler; None if it is not there or unreadable."""
    source = model.pretrained_config_name_or_path or model.pretrained_model_name_or_path
    try:
        content = json.loads((Path(source) / "scheduler" / "scheduler_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def markers(model: ModelConfig) -> frozenset[str]:
    """The markers in a single file.

    Raises:
        ModelError: It is no safetensors file.
    """
    source = Path(model.pretrained_model_name_or_path)
    if not source.is_file():
        return frozenset()
    return frozenset({VELOCITY_MARKER, ZERO_SNR_MARKER} & read_header(source, error=ModelError).keys())


def own_shapes(header: Mapping[str, tuple[int, ...]], *, prefix: str) -> list[tuple[int, ...]]:
    """Shapes of the tensors with a prefix; of all tensors if none has it."""
    own = [shape for name, shape in header.items() if name.startswith(prefix)]
    return own or list(header.values())


def _numbers_of_values(source: Path, spec: ModelSpec) -> Iterator[int]:
    folder = source / spec.denoiser_name
    files = (
        [source]
        if source.is_file()
        else sorted((folder if folder.is_dir() else source).glob(f"*{FILE_SUFFIX}"))
    )
    yield from _numbers_in(files, prefix=DENOISER_PREFIX)


def _numbers_in(files: Sequence[Path], *, prefix: str) -> Iterator[int]:
    # Variants of the weights may lie beside each other: the plain ones count, else the first variant.
    plain = [file for file in files if "." not in file.stem]
    for file in plain or files:
        yield sum(map(math.prod, own_shapes(read_header(file, error=ModelError), prefix=prefix)))
