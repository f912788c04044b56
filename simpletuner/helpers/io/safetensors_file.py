"""Open safetensors files of unknown origin."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from simpletuner.helpers.errors import SimpleTunerError

if TYPE_CHECKING:
    from torch import Tensor

MAX_AXES = 8
"""Of a tensor; torch's layers have at most 5."""
METADATA = "__metadata__"
"""The key of the texts in a header."""
_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 1 << 24
"""Thirty times the header of a large single-file checkpoint."""
Part = tuple[str, str, tuple[int, ...], bytes | memoryview]
"""Name of a tensor, name of its dtype, its shape and its bytes."""


def read_header(path: Path, *, error: type[SimpleTunerError]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a file, without torch.

    Raises:
        SimpleTunerError: Of the type `error`: it is no safetensors file or cannot be read.
    """
    try:
        header = json.loads(_header_bytes(path, error=error))
        return {
            str(name): tuple(map(int, entry["shape"])) for name, entry in header.items() if name != METADATA
        }
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as failure:
        raise error(f"{path}: not a readable safetensors file: {failure}.") from failure


def read_leading_metadata(path: Path, *, error: type[SimpleTunerError]) -> tuple[dict[str, str], int]:
    """The texts in the header of a file that `header_bytes` made, and the place of its first tensor's bytes.

    They stand first, so the names and places of the tensors are not parsed.

    Raises:
        SimpleTunerError: Of the type `error`: it is no such file or cannot be read.
    """
    try:
        text = _header_bytes(path, error=error)
        start = text.decode().index(":") + 1
        if text[:start] != f'{{"{METADATA}":'.encode():
            raise ValueError("its header has no metadata in front")
        metadata, _ = json.JSONDecoder().raw_decode(text.decode(), start)
        return {str(key): str(value) for key, value in metadata.items()}, _LENGTH_BYTES + len(text)
    except (OSError, ValueError, RecursionError, AttributeError) as failure:
        raise error(f"{path}: not a readable safetensors file: {failure}.") from failure


def read_metadata(path: Path, *, error: type[SimpleTunerError]) -> dict[str, str]:
    """The texts in the header of a file, without torch; {} without any.

    Raises:
        SimpleTunerError: Of the type `error`: it is no safetensors file or cannot be read.
    """
    try:
        metadata = json.loads(_header_bytes(path, error=error)).get(METADATA, {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, RecursionError, AttributeError) as failure:
        raise error(f"{path}: not a readable safetensors file: {failure}.") from failure


def with_metadata(path: Path, metadata: Mapping[str, str], *, error: type[SimpleTunerError]) -> bytes:
    """The bytes of a file with other texts in its header.

    Raises:
        SimpleTunerError: Of the type `error`: it is no safetensors file or cannot be read.
    """
    try:
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(_header_bytes(path, error=error)) | {METADATA: dict(metadata)}
    except (OSError, ValueError, RecursionError, TypeError) as failure:
        raise error(f"{path}: not a readable safetensors file: {failure}.") from failure
    return header_bytes(header) + data[start:]


def places_of(parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """The header's entry of each part, where they stand one behind the other."""
    places, end = {}, 0
    for name, dtype, shape, data in parts:
        offsets = [end, end := end + len(data)]
        places[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    return places


def header_bytes(header: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A header as it stands at the start of a file: metadata, then the other keys sorted.

    Equal headers give equal bytes.
    """
    keys = sorted(header, key=lambda key: (key != METADATA, key))
    ordered = {key: dict(sorted(header[key].items())) for key in keys}
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file with the permissions that the umask gives; safetensors lets its owner alone read it.

    Args:
        tensors: Contiguous, on the host, none a view of another.
        path: Of the file.
        metadata: Texts of its header.

    Raises:
        SafetensorError: It cannot be written.
        OSError: It cannot be made.
    """
    from safetensors.torch import save_file  # here, because headers are read without torch

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


@contextmanager
def open_safetensors(path: Path, *, error: type[SimpleTunerError]) -> Iterator[Any]:
    """Open a safetensors file, after refusing a header that would fill the memory or is ambiguous.

    Raises:
        SimpleTunerError: Of the type `error`, also while the file is open: it is damaged or cannot be read.
    """
    try:
        _check_header(path, _header_bytes(path, error=error), error=error)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as failure:
        raise error(
            f"{path}: not a readable safetensors file: {failure}. Copy or download it again."
        ) from failure


def _header_bytes(path: Path, *, error: type[SimpleTunerError]) -> bytes:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise error(
                f"{path}: this is no safetensors file: its header claims {length} bytes, and the limit is "
                f"{MAX_HEADER_BYTES}. Give the path of a .safetensors file."
            )
        return stream.read(length)


def _check_header(path: Path, text: bytes, *, error: type[SimpleTunerError]) -> None:
    """Refuse what the library passes over: a key that stands twice, a tensor of very many axes."""
    try:
        header = json.loads(text, object_pairs_hook=_refuse_doubled)
    except _DoubledKeyError as doubled:
        raise error(
            f"{path}: its header has the key {doubled} twice. Copy or download it again."
        ) from doubled
    except (ValueError, RecursionError):
        return  # the library has its own message
    for key, entry in header.items() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and len(shape) > MAX_AXES:
            raise error(
                f"{path}: {key[:80]!a} has {len(shape)} axes; at most {MAX_AXES} are read. It holds no "
                "weights of a model."
            )


class _DoubledKeyError(Exception):
    """A JSON object has a key twice."""


def _refuse_doubled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _DoubledKeyError(f"{name[:80]!a}")
    return found
