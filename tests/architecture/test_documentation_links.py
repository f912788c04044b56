"""Links of the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = ("README.md", "documentation/*.md", "config/examples/*.md")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading(repository: Path) -> None:
    dead: list[str] = []
    num_links = 0
    for page in (file for pattern in PAGES for file in repository.glob(pattern)):
        for link in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"https?://", link):
                continue
            num_links += 1
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                dead.append(f"{page.relative_to(repository)}: {link}")
    assert num_links > 50
    assert not dead


def test_no_page_names_a_test(repository: Path) -> None:
    """A page links the file of a test instead: names of tests change with what they say."""
    naming = [
        f"{page.relative_to(repository)}: {name}"
        for pattern in PAGES
        for page in repository.glob(pattern)
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert not naming
