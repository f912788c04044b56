"""Tensors on disk; an entry's key is a hash of everything that its tensors depend on."""

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
from simpletuner.helpers.io.redaction import redacted

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_KEY_FIELD, _DIGEST_FIELD = "key", "digest"
_KEY = re.compile(r"[0-9a-f]{32}")
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
# The largest entry we write is a text embedding of a few MB; a larger file is not ours.
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

    Each file's metadata holds a digest of its key and tensors. An entry that does not match its digest is
    removed and counts as missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The path of a key's entry, which need not exist."""
        assert _KEY.fullmatch(key), f"{key!r} is no content key"
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU; None if there is no entry or it is damaged.

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
        """Whether there is an undamaged entry; reads it."""
        return isinstance(key, str) and self.get(key) is not None

    def put(self, key: str, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
        """Write or replace an entry; the metadata, which is redacted, is for people who look into the file.

        Raises:
            StorageError: The entry cannot be written.
        """
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        noted = {name: redacted(text) for name, text in metadata.items()}
        fields = {**noted, _KEY_FIELD: key, _DIGEST_FIELD: _digest(key, on_cpu)}
        # Not durable: an entry that a power cut damages fails its digest and is encoded again.
        write_bytes(self.path(key), safetensors_torch.save(on_cpu, fields), durable=False)

    def remove_stale(self) -> None:
        """Remove the temporary files of writers on this machine that no longer run."""
        if self.folder.is_dir():
            for folder in (self.folder, *self.folder.iterdir()):
                remove_leftovers(folder)

    def _discard(self, path: Path, reason: str) -> None:
        shown = printable(str(path))
        logger.warning("Cache entry %s is damaged (%s) and was removed.", shown, printable(reason))
        path.unlink(missing_ok=True)


def _checked(data: bytes, key: str) -> dict[str, Tensor]:
    """Parse an entry and check its key and digest.

    Raises:
        ValueError: The key or the digest differs.
        SafetensorError: It is no safetensors file.
    """
    tensors = safetensors_torch.load(data)
    header_end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    metadata = json.loads(data[_LENGTH_BYTES:header_end])["__metadata__"]
    if metadata[_KEY_FIELD] != key:
        raise ValueError("it belongs to another key")
    if metadata[_DIGEST_FIELD] != _digest(key, tensors):
        raise ValueError("its digest differs")
    return tensors


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
