"""What of a repository lies in the hub's cache on this machine, without a request. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.io.paths import folder_bytes


def hub_folder() -> Path:
    """The folder of the hub's cache, to which models are downloaded."""
    # A model on this machine needs none of it.
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def cached_bytes(repository: str) -> int:
    """Bytes of a repository's files in the cache, those of an unfinished download included."""
    # Snapshots link to the blobs; where the system allows no links, they hold the files themselves.
    return folder_bytes(hub_folder() / f"models--{repository.replace('/', '--')}")
