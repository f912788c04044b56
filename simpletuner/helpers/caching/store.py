"""Tensors on disk under keys that are made from what the tensors were computed from."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import uint8

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.atomic import remove_leftovers, write_bytes
from simpletuner.helpers.io.names import printable

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_KEY_FACT, _DIGEST_FACT = "key", "digest"
_KEY = re.compile(r"[0-9a-f]{32}")
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
# The largest entry we write is a text embedding of a few MB; anything beyond is not ours.
MAX_ENTRY_BYTES = 1 << 30


def content_key(*parts: bytes | str) -> str:
    """A 128-bit key, in hexadecimal, that depends on every part and on where each of them ends."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()


class TensorStore:
    """A folder of safetensors files, one per key, in subfolders by the key's first two characters.

    Every file carries a digest of its key and its tensors. An entry that does not match it is removed and
    counts as missing, so that whoever fills the store makes it again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry of a key lies, whether or not it exists."""
        assert _KEY.fullmatch(key), f"{key!r} is no content key"
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU; None when there is no entry or the entry was damaged.

        Raises:
            DataError: The entry exists and cannot be read.
        """
        path = self.path(key)
        try:
            if path.stat().st_size > MAX_ENTRY_BYTES:
                self._discard(path, f"it is over {MAX_ENTRY_BYTES} bytes")
                return None
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(
                f"{printable(str(path))}: the cache entry cannot be read: {error.strerror}. "
                "Give read permission or choose another cache folder."
            ) from error
        try:
            return _checked(data, key)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._discard(path, str(error))
            return None

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry and it is whole; it is read for that."""
        return isinstance(key, str) and self.get(key) is not None

    def put(self, key: str, tensors: Mapping[str, Tensor], *, spec: Mapping[str, str]) -> None:
        """Write an entry, replacing what was there; facts are for people who look into the file.

        Raises:
            StorageError: The entry cannot be written.
        """
        whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        metadata = {**spec, _KEY_FACT: key, _DIGEST_FACT: _digest(key, whole)}
        # Not durable: an entry that a power cut damages fails its digest and is made again.
        write_bytes(self.path(key), safetensors_torch.save(whole, metadata), durable=False)

    def remove_stale(self) -> None:
        """Remove temporary files of writers on this machine that no longer run."""
        if self.folder.is_dir():
            for folder in (self.folder, *self.folder.iterdir()):
                remove_leftovers(folder)

    def _discard(self, path: Path, reason: str) -> None:
        shown = printable(str(path))
        logger.warning("Cache entry %s is damaged (%s) and was removed.", shown, printable(reason))
        path.unlink(missing_ok=True)


def _checked(data: bytes, key: str) -> dict[str, Tensor]:
    """The tensors in the bytes of an entry.

    Raises:
        ValueError: The entry belongs to another key or its tensors are not those that were written.
        SafetensorError: The bytes are no safetensors file.
    """
    tensors = safetensors_torch.load(data)
    header_end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    metadata = json.loads(data[_LENGTH_BYTES:header_end])["__metadata__"]
    if metadata[_KEY_FACT] != key:
        raise ValueError("it belongs to another key")
    if metadata[_DIGEST_FACT] != _digest(key, tensors):
        raise ValueError("its digest differs")
    return tensors


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
