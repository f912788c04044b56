"""The pages of the documentation as tests read them: fenced blocks, and the comment before each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PATTERNS = ("README*.md", "documentation/**/*.md", "config/examples/*.md")
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]+) -->\n\n?)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `note` is the html comment before it."""

    page: str
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page, in the order of its path."""
    return sorted(page for pattern in PATTERNS for page in REPOSITORY.glob(pattern))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        yield Block(
            page=page.relative_to(REPOSITORY).as_posix(),
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            note=found["note"] or "",
            text=found["text"],
        )
