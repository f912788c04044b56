"""Text that is safe to print, text that is safe as a file name, and a number with its noun."""

from __future__ import annotations

import re
import unicodedata

_NOT_ALLOWED = re.compile(r"[^\w.+-]+")
_MAX_BYTES = 120


def printable(text: str) -> str:
    """The text on one line: control characters and bytes that are not UTF-8 become escapes."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def file_name(text: str) -> str:
    """A file name from the text: one path component, not hidden, at most 120 bytes.

    Two texts may give one name; a caller that needs unique names adds a number or a digest.
    """
    plain = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode("utf-8"))
    name = _NOT_ALLOWED.sub("_", plain).strip("._-")
    while len(name.encode()) > _MAX_BYTES:
        name = name[:-1]
    return name or "unnamed"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 image, 2 images, 1,000 images; `plural` if that does not end in s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
