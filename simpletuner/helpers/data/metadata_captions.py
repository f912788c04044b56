"""Captions in JSON files beside the images, and in tables of a whole folder."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from simpletuner.helpers.data.captions import (
    MISSING,
    CaptionReader,
    Captions,
    TextFileCaptions,
    decoded,
    within_limit,
)
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, read_bounded
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

CAPTION_KEYS = ("caption", "captions", "text", "prompt", "tags")
"""Keys of a JSON object, or columns of a table, that hold captions; the first that is there counts."""
FILE_KEY = "file_name"
"""Column of a table: the path of an image from the table's folder. Source: imagefolder of Hugging Face."""
_SHOWN = 8


class JsonCaptions(TextFileCaptions):
    """The .json file beside an image."""

    is_plain = False

    def captions_in(self, text: str) -> Captions:
        """The captions in a JSON text: a text, several in an array, or either under a key of an object."""
        value = _parsed(text)
        if isinstance(value, Mapping):
            key = _caption_key(value)
            return _captions(value[key], key)
        return _captions(value, "its content")


class MetadataCaptions(CaptionReader):
    """The row of an image in a metadata.jsonl or metadata.csv.

    Raises:
        DataError: A table cannot be used; the message names it and the row.
    """

    reads_metadata = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rows: dict[str, dict[Captions, str]] = {}
        for table in self.scan.tables:
            folder = posixpath.dirname(table.name)
            for place, row in _rows(table):
                name, captions = _row(row, place)
                path = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
                self._rows.setdefault(path, {}).setdefault(captions, place)

    def read(self, file: FoundFile) -> Captions:
        """The captions in the image's row; none if there is no row."""
        found = self._rows.get(file.name, {})
        if len(found) > 1:
            raise DataError(
                f"{' and '.join(found.values())} hold different captions of {printable(file.name)}. "
                "Keep one of them, with several captions as a list"
            )
        return next(iter(found), MISSING)

    def unused(self) -> list[str]:
        """The names in the tables of files that are not there."""
        images = {each.name for each in self.scan.images} | {name for name, _ in self.scan.skipped}
        return [printable(name) for name in self._rows if name not in images]


def _rows(table: FoundFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and content of each row of a table."""
    shown = printable(table.name)
    try:
        text = decoded(read_bounded(table, limit=MAX_FILE_BYTES))
        rows = _csv_rows(text) if table.name.lower().endswith(".csv") else _json_rows(text)
        for number, row in rows:
            yield f"{shown}, line {number}", row
    except DataError as error:
        raise DataError(f"{table.place}: {error}") from error


def _json_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Not splitlines: other characters that Unicode counts as line ends may stand in a JSON text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except DataError as error:
            raise DataError(f"line {number}: {error}") from error
        if not isinstance(row, Mapping):
            raise DataError(f"line {number} is no JSON object. Write one for each image")
        yield number, row


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    f"line {reader.line_num} has more columns than the first. Quote commas in texts"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"after line {reader.line_num}: {error}") from error


def _row(row: Mapping[str, Any], place: str) -> tuple[str, Captions]:
    name = row.get(FILE_KEY)
    if not isinstance(name, str) or not name:
        raise DataError(f"{place}: {FILE_KEY} is {_found(name)}. Give the path of an image as a text")
    try:
        key = _caption_key(row)
        return name, _captions(row[key], key)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def _caption_key(row: Mapping[str, Any]) -> str:
    key = next((each for each in CAPTION_KEYS if each in row), None)
    if key is None:
        names = ", ".join(map(printable, list(row)[:_SHOWN])) or "none"
        raise DataError(f"it has none of the keys {', '.join(CAPTION_KEYS)} (it has {names})")
    return key


def _captions(value: object, key: str) -> Captions:
    """The captions in a value: a text, or a list of texts; a list of tags is one caption."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise DataError(f"{key} is {_found(value)}. Give a text or a list of texts")
    stripped = [text for each in texts if (text := each.strip())]
    for text in stripped:
        _refuse_unusable(text, key)
    if key == "tags" and len(stripped) > 1:
        stripped = [", ".join(stripped)]
    if not stripped:
        return Captions(texts=("",), note="empty")
    return within_limit(tuple(dict.fromkeys(stripped)))


def _refuse_unusable(text: str, key: str) -> None:
    """Raise for what JSON can write and no tokenizer can read."""
    if "\0" in text:
        raise DataError(f"{key} holds a NUL character. Remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{key} holds half of a surrogate pair. Write the character itself") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_int=float)  # int refuses numbers of over 4,300 digits
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise DataError("it is not JSON for captions: it is nested too deep") from error


def _found(value: object) -> str:
    return "missing" if value is None else printable(repr(value))[:80]
