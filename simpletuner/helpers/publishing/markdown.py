"""Markdown with texts of unknown content: no text ends its cell, opens a tag or begins a heading."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from simpletuner.helpers.io.names import printable

# Dots and dashes begin lists only, and an underscore between letters is one; the rest may mean something.
_SPECIAL = re.compile(
    r"[^\w\s.,'()/%=-]|(?<![a-z0-9])_|_(?![a-z0-9])|^[^\w\s]|(?<=^\d)[.)]|(?<=^\d\d)[.)]",
    re.ASCII | re.IGNORECASE,
)


def escape(text: object) -> str:
    """A text on one line of a paragraph or a table: special characters become references."""
    line = printable(" ".join(str(text).split()))
    return _SPECIAL.sub(lambda match: _reference(match[0]), line)


def fenced(code: str, language: str) -> str:
    """A block of code, in a fence that is longer than any in the code."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the cells are escaped."""
    lines = [_row(columns), _row(["---"] * len(columns))]
    return "\n".join([*lines, *(_row([escape(cell) for cell in row]) for row in rows)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reference(character: str) -> str:
    # A letter of another alphabet is no special character of Markdown.
    return f"&#{ord(character)};" if character.isascii() else character
