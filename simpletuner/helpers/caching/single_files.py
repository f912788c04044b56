"""Cache entries in files of their own, as earlier versions wrote them; read only."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from simpletuner.helpers.caching.shards import digest_of
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
KEY_FIELD, DIGEST_FIELD = "key", "digest"
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
# The largest entry we wrote is a text embedding of a few MB; a larger file is not ours.
MAX_ENTRY_BYTES = 1 << 30


class SingleFiles:
    """One safetensors file for each key, in subfolders by the key's first two characters.

    Each file's metadata holds a digest of its key and tensors. A file that does not match it is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, key: str) -> Path:
        """The path of a key's entry, which need not exist."""
        return self._folder / key[:2] / f"{key}{SUFFIX}"

    def found(self) -> set[str]:
        """The keys of all files."""
        keys: set[str] = set()
        if not self._folder.is_dir():
            return keys
        with os.scandir(self._folder) as listing:
            folders = [each.path for each in listing if _FOLDER.fullmatch(each.name) and each.is_dir()]
        for folder in folders:
            with os.scandir(folder) as listing:
                names = [each.name for each in listing]
            keys.update(name.removesuffix(SUFFIX) for name in names if _FILE.fullmatch(name))
        return keys

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, on the CPU; None if there is no file or it is damaged.

        Raises:
            DataError: The file exists and cannot be read.
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

    def _discard(self, path: Path, reason: str) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            done = f"cannot be removed: {error.strerror}"
        else:
            done = "was removed"
        shown = printable(str(path))
        logger.warning("Cache entry %s is damaged (%s) and %s.", shown, printable(reason), done)


def _checked(data: bytes, key: str) -> dict[str, Tensor]:
    """Parse an entry and check its key and digest.

    Raises:
        ValueError: The key or the digest differs.
        SafetensorError: It is no safetensors file.
    """
    tensors = safetensors_torch.load(data)
    header_end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    metadata = json.loads(data[_LENGTH_BYTES:header_end])["__metadata__"]
    if metadata[KEY_FIELD] != key:
        raise ValueError("it belongs to another key")
    if metadata[DIGEST_FIELD] != digest_of(key, tensors).hex():
        raise ValueError("its digest differs")
    return tensors
