"""The site of the documentation builds without a warning, and its pages show what GitHub shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.pages import REPOSITORY, pages

SHOWN = {
    "heading": "heading",
    "table": "table",
    "ordered_list": "ol",
    "bullet_list": "ul",
    "list_item": "li",
    "fence": "pre",
    "code_block": "pre",
    "blockquote": "blockquote",
}
"""Token of a page as GitHub reads it -> element of the site."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error (--quiet would hide them from the check)."""
    pytest.importorskip("material", reason='pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


class _Article(HTMLParser):
    """Counts the elements of a page's text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self._inside |= tag == "article"
        if self._inside:
            self.found["heading" if re.fullmatch("h[1-6]", tag) else tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"


def _html(site: Path, page: Path) -> str:
    place = page.relative_to(REPOSITORY)
    inside = place.parts[0] == "documentation"
    file = site.joinpath(*place.parts[1:]) if inside else site / "repository" / place
    name = "index.html" if file.name == "README.md" else f"{file.stem}.html"
    return (file.parent / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_a_page_has_the_headings_tables_lists_and_blocks_of_github(site: Path, page: Path) -> None:
    wanted: Counter[str] = Counter()
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        kind = token.type.removesuffix("_open")
        if kind in SHOWN and not token.type.endswith("_close"):
            wanted[SHOWN[kind]] += 1
    article = _Article()
    article.feed(_html(site, page))
    assert {element: article.found[element] for element in SHOWN.values()} == {
        element: wanted[element] for element in SHOWN.values()
    }


def test_the_search_finds_words_of_both_languages_and_no_source_files(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert {"en", "ja"} <= set(index["config"]["lang"])
    found = [entry["location"] for entry in index["docs"] if "tlora_min_rank" in entry["text"]]
    assert [place for place in found if place.startswith("tlora.html")]
    assert not [entry["location"] for entry in index["docs"] if ".py" in entry["location"]]


def test_a_link_to_a_file_of_the_repository_leads_to_its_text(site: Path) -> None:
    links = re.findall(r'href="(repository/tests/[^"]+)"', (site / "tlora.html").read_text(encoding="utf-8"))
    assert len(links) > 10
    for link in set(links):
        source = REPOSITORY / link.removeprefix("repository/").removesuffix(".txt")
        assert (site / link).read_bytes() == source.read_bytes()


def test_a_page_loads_nothing_from_another_server(site: Path) -> None:
    html = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|<link[^>]+href)="https?:[^"]+"', html)
