"""Whether the captions of a run have its new token. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.configuration.text.problems import shown
from simpletuner.helpers.data.preview import DatasetPreview
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import counted, printable


def check_previews(config: RunConfig, previews: Sequence[DatasetPreview], *, are_all: bool) -> None:
    """Check the captions that were read, as `check_captions` does; `are_all` if these are all datasets.

    Raises:
        DataError: The same.
    """
    sees_all = are_all and all(each.is_whole and each.unreachable is None for each in previews)
    texts = (text for each in previews for text in each.trained_captions())
    check_captions(config, texts, are_all=sees_all)


def check_captions(config: RunConfig, captions: Iterable[str], *, are_all: bool = True) -> None:
    """Check that the captions that are trained have the new token, if the run trains one.

    Args:
        config: The run.
        captions: Captions of trained images.
        are_all: Whether these are all; others may have the token.

    Raises:
        DataError: None has it, or one has it in other letters, which prompts do not take for the token.
    """
    token = config.new_tokens.placeholder_token
    if token is None:
        return
    texts = list(dict.fromkeys(captions))
    # The tokenizer finds the word in any case of its letters, the embeddings after the first only as it is.
    others = [text for text in texts if token.lower() in text.replace(token, " ").lower()]
    if others:
        raise DataError(
            f"placeholder_token {printable(token)}: a caption writes it otherwise: {shown(others[0])}. Write "
            "it as placeholder_token does."
        )
    if are_all and not any(token in text for text in texts):
        example = next(filter(None, texts), None)
        instead = "all are empty" if example is None else f"for instance {shown(example)}"
        raise DataError(
            f"placeholder_token {printable(token)} is in none of {counted(len(texts), 'caption')}: "
            f"{instead}. Write it in the captions, or in instance_prompt of the dataset."
        )
