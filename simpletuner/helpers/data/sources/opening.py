"""The source of an entry of the dataset json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.data.sources.base import ImageSource, Scan, scan_source


def open_source(entry: ImagePlace) -> ImageSource[Any]:
    """The source that holds the images of an entry.

    Raises:
        MissingDependencyError: Its optional package is not installed.
        DataError: It cannot be reached.
    """
    source: ImageSource[Any] = IMAGE_SOURCES[entry.source].load()(entry)
    return source


def scan_entry(entry: ImagePlace, *, cache: Path | None = None, is_read_only: bool = False) -> Scan:
    """Find the images and text files of an entry of the dataset json.

    Args:
        entry: The entry.
        cache: Folder of its latents, where a source may keep what it learnt; None keeps nothing.
        is_read_only: Use what is kept there, and write nothing.

    Raises:
        MissingDependencyError: An optional package is not installed.
        DataError: The source cannot be read.
    """
    source = open_source(entry)
    if cache is not None:
        source.remember_in(cache, is_read_only=is_read_only)
    return scan_source(source)
