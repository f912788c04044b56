"""Open safetensors files of unknown origin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from simpletuner.helpers.errors import SimpleTunerError

MAX_HEADER_BYTES = 1 << 24
"""Thirty times the header of a large single-file checkpoint."""


def read_header(path: Path, *, error: type[SimpleTunerError]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a file, without torch.

    Raises:
        SimpleTunerError: Of the type `error`: it is no safetensors file or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {length} bytes, and the limit is {MAX_HEADER_BYTES}")
            header = json.loads(stream.read(length))
        return {
            str(name): tuple(map(int, entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as failure:
        raise error(f"{path}: not a readable safetensors file: {failure}.") from failure


@contextmanager
def open_safetensors(path: Path, *, error: type[SimpleTunerError]) -> Iterator[Any]:
    """Open a safetensors file, after refusing a header that would fill the memory.

    Raises:
        SimpleTunerError: Of the type `error`, also while the file is open: it is damaged or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise error(
                f"{path}: this is no safetensors file: its header claims {header_bytes} bytes, and the limit "
                f"is {MAX_HEADER_BYTES}. Give the path of a .safetensors file."
            )
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as failure:
        raise error(
            f"{path}: not a readable safetensors file: {failure}. Copy or download it again."
        ) from failure
