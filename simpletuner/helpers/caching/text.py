"""Cached embeddings of prompts."""

from __future__ import annotations

from torch import Tensor

from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.contracts import TextEmbeds


def text_key(prompt: str, *, text_identity: str) -> str:
    """The cache key of a prompt's embeddings."""
    # Limit: no format version, unlike the key of latents; adding one would invalidate existing caches.
    return content_key("text", text_identity, prompt)


def text_entry(embeds: TextEmbeds) -> dict[str, Tensor]:
    """The cache entry of a prompt's embeddings."""
    return embeds.tensors()


def read_text(store: TensorStore, key: str) -> TextEmbeds | None:
    """The cached embeddings, with a batch axis of 1, on the CPU; None if there are none."""
    entry = store.get(key)
    return TextEmbeds.from_tensors(entry) if entry is not None and "tokens" in entry else None
