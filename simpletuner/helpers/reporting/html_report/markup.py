"""HTML building blocks: user text is escaped and secrets are hidden."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable
from pathlib import Path

from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import redacted

_STYLE = Path(__file__).with_name("page.css")


def document(title: str, body: str, *, script: str, style: str = "") -> str:
    """A self-contained HTML document in the report's style; the browser runs its script and loads nothing.

    Args:
        title: Of the document.
        body: HTML.
        script: The only one that the browser runs.
        style: Rules beside the report's.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def escape(text: object) -> str:
    """Redact and escape text for an element or an attribute; control characters become visible escapes."""
    return html.escape("\n".join(printable(line) for line in redacted(str(text)).split("\n")))


def data_block(data: object) -> str:
    """JSON for the page's script; no text in it can close the script element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def note(text: str) -> str:
    """A paragraph in small print; "" without text."""
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def disclosure(summary: str, content: str) -> str:
    """Content in a collapsed details element."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def definition_list(entries: Iterable[tuple[str, object]]) -> str:
    """Terms and values; entries without a value are left out."""
    rows = [
        f"<div><dt>{escape(name)}</dt><dd>{escape(value).replace('/', '/<wbr>')}</dd></div>"
        for name, value in entries
        if value not in (None, "")
    ]
    return f'<dl class="facts">{"".join(rows)}</dl>'


def section(anchor: str, title: str, *blocks: str) -> str:
    """A section of the page; "" without content."""
    content = "\n".join(filter(None, blocks))
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{content}\n</section>' if content else ""


def format_number(value: float) -> str:
    """Four significant digits; integers and values from 10,000 in full, with thousands separators."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 10_000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_count(count: int, noun: str) -> str:
    """A count and its noun, with a plural s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{seconds:.1f} s"
