"""Links of the documentation lead to files and headings, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = ("README*.md", "documentation/**/*.md", "config/examples/*.md")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def _pages(repository: Path) -> list[Path]:
    return [page for pattern in PAGES for page in repository.glob(pattern)]


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading(repository: Path) -> None:
    dead: list[str] = []
    num_links = 0
    for page in _pages(repository):
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


def test_every_test_that_a_page_names_exists(repository: Path) -> None:
    files = list((repository / "tests").rglob("test_*.py"))
    names = {
        name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))
    }
    names |= {file.name for file in files}
    unknown = [
        f"{page.relative_to(repository)}: {name}"
        for page in _pages(repository)
        for name in re.findall(r"\btest_\w+(?:\.py)?", page.read_text(encoding="utf-8"))
        if name not in names
    ]
    assert not unknown
