"""Keeps the values of {env:VAR} out of all that is shown or written; the placeholder stands there instead.

The values are remembered while a configuration is loaded. Text that leaves for the terminal passes a
`RedactingStream`; whatever writes text from a configuration to a file or a tracker calls `redacted`.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TextIO, cast

SHORTEST_SECRET = 4
"""Characters. Shorter values are everywhere, so they stay."""
PLACEHOLDER = re.compile(r"\{env:([^{}]*)\}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


@dataclass(frozen=True, slots=True)
class _Hidden:
    placeholder: str
    digest: str
    """Of the value, to notice another one."""


_hidden: dict[str, _Hidden] = {}
"""Each spelling of each value."""
_placeholders: dict[str, str] = {}
"""Each value of the environment, short ones too -> its placeholder."""


def hide(value: str, placeholder: str) -> None:
    """Show this placeholder in place of a value from now on, in each spelling in which it may appear."""
    if PLACEHOLDER.fullmatch(placeholder):
        _placeholders[value.strip()] = placeholder
    hidden = _Hidden(placeholder, hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()[:16])
    for text in _in_text(value):
        if len(text.strip()) >= SHORTEST_SECRET:
            _hidden.update(dict.fromkeys(_escaped(text), hidden))


def placeholder_of(secret: str) -> str | None:
    """The placeholder of a whole secret, however short; None if it was written as it is."""
    return _placeholders.get(secret.strip())


def hide_named(text: str) -> None:
    """Hide the value of each variable of the environment whose placeholder a text holds."""
    for name in PLACEHOLDER.findall(text):
        if name in os.environ:
            hide(os.environ[name], f"{{env:{name}}}")


def redacted(text: str, *, with_digest: bool = False) -> str:
    """The text with placeholders for the hidden values and *** for credentials in URLs.

    `with_digest` adds to each new placeholder a digest of its value, for comparisons.
    """

    def replacement(match: re.Match[str]) -> str:
        hidden = _hidden.get(match[0])
        if hidden is None:  # a placeholder already
            return match[0]
        return f"{hidden.placeholder}#{hidden.digest}" if with_digest else hidden.placeholder

    if _hidden:
        text = _pattern(tuple(_hidden)).sub(replacement, text)
    return _CREDENTIALS.sub("***@", text) if "@" in text else text


def redacted_json(value: object, *, with_digest: bool = False) -> Any:
    """A JSON value with its texts redacted; placeholders are not filled in keys, so those stay."""
    if isinstance(value, str):
        return redacted(value, with_digest=with_digest)
    if isinstance(value, list | tuple):
        return [redacted_json(each, with_digest=with_digest) for each in value]
    if isinstance(value, Mapping):
        return {key: redacted_json(each, with_digest=with_digest) for key, each in value.items()}
    return value


class RedactingStream:
    """A text stream that redacts what is written; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, with escapes for what the stream's encoding lacks; returns its length."""
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(redacted(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_terminal() -> None:
    """Redact what this process writes to standard output and error: logs, messages, tracebacks, libraries."""
    if not isinstance(sys.stdout, RedactingStream):
        sys.stdout = cast("TextIO", RedactingStream(sys.stdout))
    if not isinstance(sys.stderr, RedactingStream):
        sys.stderr = cast("TextIO", RedactingStream(sys.stderr))


@cache
def _pattern(spellings: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join([PLACEHOLDER.pattern, *map(re.escape, longest_first)]))


def _in_text(value: str) -> set[str]:
    """The value as it stands in a prompt, and as it stands in a path."""
    plain = value.strip()
    path = os.path.normpath(os.path.expanduser(plain)) if plain else ""
    return {value, plain, path, path.lstrip("./\\")}  # a path that leads upwards is resolved


def _escaped(text: str) -> set[str]:
    """The text, and as Python, JSON, HTML and a shell's command write it."""
    in_json = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    in_python = {repr(text)[1:-1], text.encode("unicode_escape").decode("ascii")}
    in_command = shlex.quote(f"'{text}")[len(shlex.quote("'")) - 1 : -1]
    return {text, html.escape(text), in_command, *in_json, *in_python}
