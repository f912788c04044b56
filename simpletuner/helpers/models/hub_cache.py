"""What of a repository lies in the hub's cache on this machine, without a request. Imports no torch."""

from __future__ import annotations

from pathlib import Path


def hub_folder() -> Path:
    """The folder of the hub's cache, to which models are downloaded."""
    # A model on this machine needs none of it.
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached_bytes(repository: str) -> int:
    """Bytes of a repository's files in the cache, those of an unfinished download included."""
    blobs = hub_folder() / f"models--{repository.replace('/', '--')}" / "blobs"
    try:
        return sum(file.stat().st_size for file in blobs.iterdir() if file.is_file())
    except OSError:
        return 0
