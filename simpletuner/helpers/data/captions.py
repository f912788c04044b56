"""The captions of images: beside them in a text file, in their name, or one for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from simpletuner.helpers.data.sources import FoundFile, read_bounded
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

MAX_CAPTION_FILE_BYTES = 1 << 20
# Text encoders read 77 to 512 tokens; this keeps every one of them and bounds what a tokenizer is given.
MAX_CAPTION_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of one image; each time it is trained on, one of them is drawn."""

    texts: tuple[str, ...]
    """At least one; "" when there is none."""
    note: Literal["missing", "empty", "shortened"] | None = None
    """What the report counts."""


def captions_from_file(file: FoundFile | None) -> Captions:
    """The captions in a text file, one a line; blank lines do not count.

    Raises:
        DataError: The file cannot be read, is too large or not UTF-8 text; the message is the reason alone.
    """
    if file is None:
        return Captions(texts=("",), note="missing")
    lines = _decoded(read_bounded(file, limit=MAX_CAPTION_FILE_BYTES)).splitlines()
    texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        return Captions(texts=("",), note="empty")
    if all(len(text) <= MAX_CAPTION_CHARACTERS for text in texts):
        return Captions(texts=texts)
    return Captions(texts=tuple(shortened(text) for text in texts), note="shortened")


def caption_from_name(name: str) -> Captions:
    """The file name without folder and suffix, underscores read as spaces.

    Raises:
        DataError: The name is not UTF-8; the message is the reason alone.
    """
    stem = PurePosixPath(name).stem
    try:
        stem.encode()
    except UnicodeEncodeError as error:
        raise DataError("its name is its caption and is not UTF-8; rename it") from error
    text = " ".join(stem.replace("_", " ").split())
    return Captions(texts=(text,), note=None if text else "empty")


def with_instance_prompt(captions: Captions, instance_prompt: str) -> Captions:
    """The captions, each with the instance prompt before it."""
    texts = tuple(f"{instance_prompt} {text}".strip() for text in captions.texts)
    return Captions(texts=texts, note=captions.note)


def shortened(text: str) -> str:
    """The text, or as many of its whole words as stay within the limit."""
    if len(text) <= MAX_CAPTION_CHARACTERS:
        return text
    cut = text[:MAX_CAPTION_CHARACTERS]
    return (cut.rpartition(" ")[0] or cut).strip()


def text_file_of(stem: str, texts: dict[str, tuple[FoundFile, ...]]) -> FoundFile | None:
    """The text file of an image's name without suffix; None when there is none.

    Raises:
        DataError: There are several.
    """
    files = texts.get(stem, ())
    if len(files) > 1:
        names = " and ".join(printable(file.name) for file in files)
        raise DataError(f"{names}: both could be the caption of one image. Keep one of them.")
    return files[0] if files else None


def ambiguous_captions(stems: dict[str, list[str]], texts: dict[str, tuple[FoundFile, ...]]) -> list[str]:
    """One sentence for each text file that more than one image could claim.

    `stems` maps a name without suffix to the images of that name.
    """
    return [
        f"{printable(texts[stem][0].name)} could be the caption of {' or '.join(map(printable, images))}"
        for stem, images in sorted(stems.items())
        if len(images) > 1 and stem in texts
    ]


def _decoded(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"it is not UTF-8 (byte {data[error.start]:#04x} at position {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        place = text.index("\0")
        raise DataError(f"it holds a NUL at position {place}, as UTF-16 text does; save it as UTF-8")
    return text
