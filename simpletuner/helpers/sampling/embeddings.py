"""New tokens of files (textual inversion) in the text encoders of a model family."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.adapters.files import embeddings
from simpletuner.helpers.adapters.files.embeddings import Embeddings
from simpletuner.helpers.adapters.new_tokens import TextPart
from simpletuner.helpers.io.run_folder import embedding_file

if TYPE_CHECKING:
    from simpletuner.helpers.models.family import ModelFamily

logger = logging.getLogger(__name__)


def text_parts(family: ModelFamily) -> dict[str, TextPart]:
    """The loaded text encoders of a family with their tokenizers, by their names in diffusers."""
    tokenizers = family.tokenizers
    return {name: TextPart(encoder, tokenizers[name]) for name, encoder in family.text_encoders.items()}


def read_embeddings(
    adapter: Path, header: Mapping[str, str], *, is_alone: bool = False, given: Sequence[str] = ()
) -> list[Embeddings]:
    """The new tokens to sample with: that of the adapter, from the file beside it, and those of other files.

    Args:
        adapter: The adapter file, or the file of a token that was trained alone.
        header: Of that file.
        is_alone: Whether it is that of a token.
        given: Further files, each as FILE or FILE=TOKEN.

    Raises:
        AdapterError: A file cannot be read, is no file of embeddings or names no token.
    """
    files = dict(map(_split, given))
    own = adapter if is_alone else embedding_file(adapter)
    is_given = own.resolve() in {path.resolve() for path in files}
    if (is_alone or embeddings.TOKEN_KEY in header) and not is_given:
        if own.is_file():
            files = {own: None, **files}
        elif not files:
            logger.warning(
                "%s was trained with the new token %s, and %s is not beside it. Give it with --embedding.",
                adapter.name,
                header[embeddings.TOKEN_KEY],
                own.name,
            )
    return [embeddings.read(path, token=token) for path, token in files.items()]


def _split(text: str) -> tuple[Path, str | None]:
    """File and token of FILE or FILE=TOKEN; a file may have = in its name."""
    if Path(text).is_file() or "=" not in text:
        return Path(text), None
    path, _, token = text.rpartition("=")
    return Path(path), token or None
