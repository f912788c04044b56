"""What the families' encoding of captions shares: refusing what is not finite, saying what is cut off."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from simpletuner.helpers.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 80


def check_finite_text(prompt: str, *encoded: Tensor, dtype: torch.dtype) -> None:
    """Refuse the encoding of a prompt that holds a value which is not finite.

    Raises:
        DataError: There is one; the message names the prompt.
    """
    if not all(bool(each.isfinite().all()) for each in encoded):
        raise DataError(
            "The text encoders gave values that are not finite for the prompt "
            f"{prompt[:SHOWN_CHARACTERS]!r} in {dtype}. Set mixed_precision to bf16 or no."
        )


class TruncationWarning:
    """Says once, of the first batch with such a caption, that text encoders see only the beginning of it."""

    def __init__(self, *, limit: int, reader: str = "the text encoders see") -> None:
        self._limit = limit
        self._reader = reader
        self._has_warned = False

    def check(self, prompts: Sequence[str], lengths: Sequence[int]) -> None:
        """Warn of the longest of these prompts if it has more tokens than are read."""
        longest = max(range(len(prompts)), key=lengths.__getitem__, default=None)
        if self._has_warned or longest is None or lengths[longest] <= self._limit:
            return
        self._has_warned = True
        logger.warning(
            "A caption has %d tokens; %s the first %d. The rest has no effect, here and in other long "
            "captions: %r",
            lengths[longest],
            self._reader,
            self._limit,
            prompts[longest][:SHOWN_CHARACTERS],
        )
