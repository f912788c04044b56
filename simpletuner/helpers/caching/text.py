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
    tensors = {"tokens": embeds.prompt_embeds, "pooled": embeds.pooled, "mask": embeds.attention_mask}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def read_text(store: TensorStore, key: str) -> TextEmbeds | None:
    """The cached embeddings, with a batch axis of 1, on the CPU; None if there are none."""
    entry = store.get(key)
    if entry is None or "tokens" not in entry:
        return None
    return TextEmbeds(
        prompt_embeds=entry["tokens"], pooled=entry.get("pooled"), attention_mask=entry.get("mask")
    )
