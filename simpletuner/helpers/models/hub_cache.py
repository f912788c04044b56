"""What of a repository lies in the hub's cache on this machine, without a request. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def hub_folder() -> Path:
    """The folder of the hub's cache, to which models are downloaded."""
    # A model on this machine needs none of it.
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached_bytes(repository: str) -> int:
    """Bytes of a repository's files in the cache, those of an unfinished download included."""
    folder, total = hub_folder() / f"models--{repository.replace('/', '--')}", 0
    # Snapshots link to the blobs; where the system allows no links, they hold the files themselves.
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            with suppress(OSError):  # another process may finish its download meanwhile
                total += 0 if file.is_symlink() else file.stat().st_size
    return total
