"""Keys of images and captions that are rows of a table or of a Hugging Face dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo
from pydantic_core import PydanticCustomError

from simpletuner.helpers.configuration.schema.base import (
    InputFile,
    LateSection,
    OptionalText,
    Section,
    none_word,
    path_context,
)
from simpletuner.helpers.configuration.schema.values import is_off, repository_problem

TABLE, HUB = "table", "huggingface"
"""Values of `type` whose images are rows."""


TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def of_types(*types: str, required: bool = False) -> BeforeValidator:
    """A check that a key is given where `type` is one of these, and only there."""

    def check(value: object, info: ValidationInfo) -> object:
        kind, value = info.data.get("type"), none_word(value)
        if kind is None:  # which is a problem of its own
            return value
        if kind not in types and not is_off(value):
            names = " or ".join(f'"{each}"' for each in types)
            raise ValueError(f'belongs to "type": {names}, and type is "{kind}". Remove it, or set type.')
        if required and kind in types and value is None:
            raise PydanticCustomError("missing", "required")
        return value

    return BeforeValidator(check)


def _is_table(path: Path) -> Path:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise ValueError(f"must be one of {', '.join(TABLE_SUFFIXES)}.")
    return path


TableFile = Annotated[InputFile, AfterValidator(_is_table)]


def _dataset(value: object, info: ValidationInfo) -> object:
    """A folder of this machine as its absolute path, else the name of a repository."""
    if not isinstance(value, str):
        return value
    found = path_context(info).input_path(value)
    if found is not None and found.is_dir():
        return str(found)
    if found is not None:
        raise ValueError('is a file. For a csv, jsonl or parquet file use "type": "table" and table_file.')
    if os.path.isabs(value) or value.startswith((".", "~")):
        raise ValueError("not found. Give a folder on this machine, or owner/name of a dataset of the hub.")
    name = value.strip().removeprefix("https://huggingface.co/").removeprefix("datasets/").rstrip("/")
    if problem := repository_problem(name):
        raise ValueError(f"{problem} For a dataset on this machine give its folder.")
    return name


def _columns(value: object) -> object:
    """One name, or several: a name may hold a comma."""
    value = none_word(value)
    return () if value is None else (value,) if isinstance(value, str) else value


def _word(value: object) -> object:
    """A switch as the word that JSON has for it; numbers become texts by themselves."""
    return str(value).lower() if isinstance(value, bool) else value


def _filter(value: object) -> object:
    """Conditions by column; a single value is a list of one."""
    if is_off(value):
        return {}
    if not isinstance(value, Mapping):
        return value
    return {key: each if isinstance(each, _CONDITIONS) else [each] for key, each in value.items()}


Columns = Annotated[tuple[str, ...], BeforeValidator(_columns)]


class Range(Section):
    """Numbers that a filter keeps."""

    min: float | None = None
    """Least number; null is without limit."""
    max: float | None = None
    """Largest number; null is without limit."""


_CONDITIONS = (Mapping, Range, list, tuple)


def _kind(condition: object) -> str:
    return "limits" if isinstance(condition, Mapping | Range) else "values"


_Condition = Annotated[
    Annotated[Range, Tag("limits")]
    | Annotated[tuple[Annotated[str, BeforeValidator(_word)], ...], Tag("values")],
    Discriminator(_kind),
]
RowFilter = Annotated[dict[str, _Condition], BeforeValidator(_filter)]


class RowKeys(LateSection):
    """Which rows are images: keys of every entry of images, masks or references."""

    table_file: Annotated[TableFile | None, of_types(TABLE, required=True)] = Field(
        default=None, validate_default=True
    )
    """With type table: the .csv, .tsv, .jsonl or .parquet file whose rows are the images."""
    dataset_name: Annotated[str | None, BeforeValidator(_dataset), of_types(HUB, required=True)] = Field(
        default=None, validate_default=True
    )
    """With type huggingface: owner/name of a dataset of the hub, which is downloaded into the hub's cache on
    first use, or the folder of a dataset on this machine."""
    split: Annotated[OptionalText, of_types(HUB)] = None
    """Split of the dataset. null is train."""
    revision: Annotated[OptionalText, of_types(HUB)] = None
    """Branch, tag or commit of the dataset. null is the newest one."""
    image_column: Annotated[OptionalText, of_types(TABLE, HUB)] = None
    """Column of the images: bytes of files, paths or URLs; with a dot, a field of a column. null is the first
    column there is of image, url, image_url, file_name, filename, image_path, path, jpg, png and webp."""


class CaptionTable(Section):
    """A table with captions of images that lie elsewhere."""

    path: TableFile
    """The .csv, .tsv, .jsonl or .parquet file."""
    filename_column: str = "filename"
    """Column of the images' names, with or without folder and suffix."""
    caption_column: Columns = ()
    """As in a dataset."""
    fallback_caption_column: OptionalText = None
    """As in a dataset."""


class RowCaptionKeys(LateSection):
    """Captions that are columns of a table, and the rows to use: keys of a dataset."""

    caption_column: Annotated[Columns, of_types(TABLE, HUB)] = ()
    """Column of the captions, or a list of columns, of which one is drawn each time, as with a cell that is a
    list; with a dot, a field of a column. Empty is the first column there is of caption, text and prompt."""
    fallback_caption_column: Annotated[OptionalText, of_types(TABLE, HUB)] = None
    """Column of the caption of rows that have none."""
    row_filter: Annotated[RowFilter, of_types(TABLE, HUB)] = Field(default_factory=dict)
    """Rows to use: an object with a list of values, or {"min", "max"}, for each column that must agree."""
    streaming: Annotated[bool, of_types(HUB)] = False
    """Download only the first max_num_samples rows of the dataset, which are kept in the hub's cache."""
    parquet: Annotated[CaptionTable | None, BeforeValidator(none_word)] = None
    """Captions of images that lie elsewhere: an object with the keys of CaptionTable."""
