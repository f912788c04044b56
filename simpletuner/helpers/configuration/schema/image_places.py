"""The place of the images of an entry of the dataset json: of a dataset, of masks or of references."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.base import LateSection, OneOf, path_context
from simpletuner.helpers.configuration.schema.row_keys import HUB, RowKeys
from simpletuner.helpers.configuration.schema.storage_keys import StorageKeys, folder_url, source_of
from simpletuner.helpers.configuration.schema.tar_places import check_names, tar_place
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import redacted


def _image_folder(value: object, info: ValidationInfo) -> Path | str | None:
    """A folder on this machine, a URL of a known scheme, or the place of tar archives.

    None for a source that needs none of them.
    """
    record = IMAGE_SOURCES[info.data.get("type", "local")]
    if value is None:
        if not record.holds_rows:
            raise PydanticCustomError("missing", "required")
        return None
    if info.data.get("type") == HUB:
        raise ValueError("a dataset of the hub has none. Remove it, or name a folder in dataset_name.")
    if not isinstance(value, str) or "://" not in value:
        place = tar_place(value, info)
        if isinstance(place, str) and not record.holds_archives:
            raise ValueError('is a tar archive. Set "type": "webdataset" to train from it.')
        return place
    url = folder_url(path_context(info).expand(value))
    if record.holds_rows:
        raise ValueError("must be a folder on this machine. Write whole http or https URLs into the table.")
    if record.holds_archives:
        check_names(url)
    return url


ImageFolder = Annotated[
    Path | str | None, BeforeValidator(_image_folder), Field(default=None, validate_default=True)
]


class _Entry(LateSection):
    """The keys by which the others are understood."""

    id: str
    """Name of the entry, unique in the file."""
    type: Annotated[str, OneOf(IMAGE_SOURCES)] = "local"
    """Place of the images: local, a folder on this machine, or the storage of the URL in instance_data_dir;
    webdataset, tar archives; table (also csv, jsonl, parquet), the rows of a file; huggingface, a dataset of
    the hub or in its format."""


class ImagePlace(RowKeys, StorageKeys, _Entry):
    """Where the images of an entry lie. They are only read."""

    instance_data_dir: ImageFolder
    """Folder of the images, with its subfolders, or its URL in remote storage; only read. With webdataset:
    folder of .tar archives, or their path, in which {000..012} stands for numbers, {a,b} for texts and * for
    anything. With type table: where relative paths begin; default: the table's folder."""

    @property
    def source(self) -> str:
        """Name of the record in IMAGE_SOURCES: `type`, or that of a URL's scheme where images are files."""
        record = IMAGE_SOURCES[self.type]
        if record.holds_archives or record.holds_rows or not isinstance(self.instance_data_dir, str):
            return self.type
        return source_of(self.instance_data_dir) or self.type

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that holds the images; None if they lie elsewhere."""
        return self.instance_data_dir if isinstance(self.instance_data_dir, Path) else None

    @property
    def place(self) -> str:
        """Where the images lie, in words for people, without secrets."""
        return printable(redacted(str(self.table_file or self.dataset_name or self.instance_data_dir)))

    @property
    def needs_download(self) -> bool:
        """Whether the images may have to be downloaded before they are listed."""
        return self.dataset_name is not None and not Path(self.dataset_name).is_absolute()
