"""The messages that the page of troubleshooting quotes are in the source of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.package_source import PACKAGE

VARIABLE = "…"
_QUOTE = re.compile(r"^> (.+)$", re.MULTILINE)
_VALUE = re.compile(r"%(?:\.\d+)?[dsrf]")
_NEXT_LINE = re.compile(r'"\n\s*f?"')


def _parts(quote: str) -> list[str]:
    return [part.strip() for part in quote.split(VARIABLE) if part.strip()]


def _messages(words: list[str]) -> Iterator[str]:
    """Texts of the modules that have one of these words, with … for each value that a text is given."""
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        joined = _NEXT_LINE.sub("", source)
        if not any(each in joined for each in words):  # to parse every module takes seconds
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.JoinedStr):
                texts = [each.value if isinstance(each, ast.Constant) else VARIABLE for each in node.values]
                yield "".join(map(str, texts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield _VALUE.sub(VARIABLE, node.value)


def _is_quoted_from(message: str, quote: str) -> bool:
    """Whether the words of a quote follow each other in a message, with values only where it has them."""
    parts = _parts(quote)
    if not all(part in message for part in parts):
        return False
    pattern = rf"\s?{VARIABLE}.*?\s?".join(map(re.escape, parts))
    return re.search(pattern, message, re.DOTALL) is not None


def test_every_quoted_message_is_one_of_the_packages(repository: Path) -> None:
    quotes = _QUOTE.findall((repository / "documentation/troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quotes) > 30
    messages = list(_messages([max(_parts(quote), key=len) for quote in quotes]))
    assert not [quote for quote in quotes if not any(_is_quoted_from(each, quote) for each in messages)]


def test_a_changed_message_is_noticed() -> None:
    message = f"{VARIABLE}: the disk is full: {VARIABLE} bytes free. Free some space."
    assert _is_quoted_from(message, f"{VARIABLE}: the disk is full: {VARIABLE} bytes free.")
    assert not _is_quoted_from(message, f"the disk was full: {VARIABLE} bytes free.")
    assert not _is_quoted_from(message, f"the disk {VARIABLE} full")
