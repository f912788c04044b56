"""Cached embeddings of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from simpletuner.helpers.caching.memory import EntryStore
from simpletuner.helpers.caching.store import content_key, key_part
from simpletuner.helpers.contracts import TextEmbeds


def text_key(prompt: str, *, text_identity: str) -> str:
    """The cache key of a prompt's embeddings."""
    # Limit: no format version, unlike the key of latents; adding one would invalidate existing caches.
    return content_key("text", text_identity, prompt)


def text_key_texts(prompts: Iterable[str], *, text_identity: str) -> Iterator[bytes]:
    """The bytes whose hash is the cache key of each of many prompts, as `text_key` makes it."""
    first = key_part("text") + key_part(text_identity)
    return (first + key_part(prompt) for prompt in prompts)


def text_entry(embeds: TextEmbeds) -> dict[str, Tensor]:
    """The cache entry of a prompt's embeddings."""
    return embeds.tensors()


def read_text(store: EntryStore, key: str) -> TextEmbeds | None:
    """The cached embeddings, with a batch axis of 1, on the CPU; None if there are none."""
    entry = store.get(key)
    return TextEmbeds.from_tensors(entry) if entry is not None and "tokens" in entry else None
