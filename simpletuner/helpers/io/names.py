"""Text that is safe to print, text that is safe as a file name, and a number with its noun."""

from __future__ import annotations

import re
import unicodedata

from simpletuner.helpers.io.redaction import redacted

_NOT_ALLOWED = re.compile(r"[^\w.+-]+")
_MAX_BYTES = 120
MAX_REASON_CHARACTERS = 300


def printable(text: str) -> str:
    """The text on one line: control characters and bytes that are not UTF-8 become escapes."""
    return text if text.isprintable() else "".join(map(_escaped, text))


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


def one_line_reason(error: Exception) -> str:
    """Message of a library's error on one line, redacted and cut to 300 characters."""
    return redacted(" ".join(str(error).split()))[:MAX_REASON_CHARACTERS]


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: 1 image, 2 images, 1,000 images; `plural` if that does not end in s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
