"""Hooks of mkdocs: what the pages link to outside documentation/ becomes a part of the site.

On GitHub those links lead to files of the repository; the site has a copy of each below `repository/`,
markdown as a page and the rest as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FOLDER = "repository/"
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)[^)\s#]+")
_CODE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the files that pages link to, and those that the added pages link to."""
    docs = Path(config.docs_dir)
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in _LINK.findall(_CODE.sub("", page.content_string)):
            place = _linked(link, page.src_uri, docs.name)
            uri, source = _uri(place, docs.name), docs.parent / place
            if files.get_file_from_path(uri) is None and source.is_file():
                added = File.generated(config, uri, abs_src_path=str(source))
                files.append(added)
                waiting += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Lead the links to files outside documentation/, and the links of those, to their copies."""
    del files
    source, docs = page.file.src_uri, Path(config.docs_dir).name

    def moved(link: re.Match[str]) -> str:
        return posixpath.relpath(_uri(_linked(link[0], source, docs), docs), posixpath.dirname(source) or ".")

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(moved, part) for index, part in enumerate(parts))


def _linked(link: str, page: str, docs: str) -> str:
    """The path in the repository that a link of a page of the site leads to."""
    page = page.removeprefix(FOLDER) if page.startswith(FOLDER) else f"{docs}/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _uri(place: str, docs: str) -> str:
    """The path in the site of a file of the repository."""
    if place.startswith(f"{docs}/"):
        return place.removeprefix(f"{docs}/")
    return FOLDER + (place if place.endswith(".md") else f"{place}.txt")
