"""Checks of prompt encoding that all families share: finite values, truncated prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.redaction import redacted

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 80


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
