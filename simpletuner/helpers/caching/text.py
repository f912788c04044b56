"""The embeddings of prompts, encoded once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from simpletuner.helpers.caching.latents import batched
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

_SHOWN_CHARACTERS = 80


class TextCache:
    """The embeddings of one set of text encoders, which the identity stands for."""

    def __init__(self, store: TensorStore, *, identity: str) -> None:
        self._store = store
        self._identity = identity

    def key(self, prompt: str) -> str:
        """What the embedding of a prompt is kept under."""
        return content_key("text", self._identity, prompt)

    def get(self, prompt: str) -> TextEmbeds | None:
        """The embedding of a prompt with a batch axis of 1, on the CPU; None when it has to be made."""
        entry = self._store.get(self.key(prompt))
        if entry is None or "tokens" not in entry:
            return None
        return TextEmbeds.from_tensors(entry)

    def fill(
        self,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], list[TextEmbeds]],
        *,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode the prompts that are not kept yet; returns how many that were.

        Of a shard (index, count) only every count-th prompt is handled. `on_progress` is given (done, all).

        Raises:
            DataError: An embedding is not finite.
            StorageError: An entry cannot be written.
        """
        self._store.remove_stale()
        index, count = shard
        mine = list(dict.fromkeys(prompts))[index::count]
        missing = [prompt for prompt in mine if self.get(prompt) is None]
        done = len(mine) - len(missing)
        for batch in batched(missing, batch_size):
            for prompt, embeds in zip(batch, encode(batch), strict=True):
                self._put(prompt, embeds)
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(mine))
        return len(missing)

    def _put(self, prompt: str, embeds: TextEmbeds) -> None:
        tensors = embeds.tensors()
        shown = printable(prompt[:_SHOWN_CHARACTERS])
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise DataError(
                f"The embedding of the prompt {shown!r} holds values that are not finite. "
                "The text encoder overflows in this precision: load it in float32 or bfloat16."
            )
        self._store.put(self.key(prompt), tensors, spec={"prompt": shown})
