"""Checks of prompt encoding that families share: finite values, truncated prompts, unread scripts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.redaction import redacted

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 80
PART_OF_A_CHARACTER = "\ufffd"
"""What a token stands for that holds some of the bytes of a character."""


def check_finite_text(prompt: str, *encoded: Tensor, dtype: torch.dtype) -> None:
    """Refuse prompt embeds that are not finite.

    Raises:
        DataError: A value is not finite; the message names the prompt.
    """
    if not all(bool(each.isfinite().all()) for each in encoded):
        raise DataError(
            f"The prompt embeds of {redacted(prompt)[:SHOWN_CHARACTERS]!r} are not finite in {dtype}. "
            "Set mixed_precision to bf16 or no."
        )


class TruncationWarning:
    """Warns once when a caption is longer than the text encoder's limit."""

    def __init__(self, *, limit: int, encoder: str = "the text encoder") -> None:
        self._limit = limit
        self._encoder = encoder
        self._has_warned = False

    def check(self, prompts: Sequence[str], lengths: Sequence[int]) -> None:
        """Warn if the longest of these prompts, with `lengths` tokens, exceeds the limit."""
        longest = max(range(len(prompts)), key=lengths.__getitem__, default=None)
        if self._has_warned or longest is None or lengths[longest] <= self._limit:
            return
        self._has_warned = True
        logger.warning(
            "A caption has %d tokens, but %s reads only the first %d; the rest of long captions has no "
            "effect: %r",
            lengths[longest],
            self._encoder,
            self._limit,
            redacted(prompts[longest])[:SHOWN_CHARACTERS],
        )


class ScriptWarning:
    """Warns once when a caption is in a script that the text encoder's vocabulary lacks.

    CLIP then reads single bytes of its characters, and T5 the same unknown token for all of them.
    """

    def __init__(self, *, encoder: str) -> None:
        self._encoder = encoder
        self._has_warned = False

    def check(self, prompts: Sequence[str], tokenizer: Any) -> None:
        """Warn of the first prompt with characters that the tokenizer has no token for."""
        for prompt in prompts:
            if self._has_warned or prompt.isascii():
                continue
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            texts = tokenizer.batch_decode([[each] for each in ids])
            lost = sum(PART_OF_A_CHARACTER in text or text == tokenizer.unk_token for text in texts)
            if not lost:
                continue
            self._has_warned = True
            logger.warning(
                "A caption has characters that %s has no token for: %d of its %d tokens are bytes of them or "
                "unknown. The model hardly learns from these. Write captions and prompts in English: %r",
                self._encoder,
                lost,
                len(ids),
                redacted(prompt)[:SHOWN_CHARACTERS],
            )
