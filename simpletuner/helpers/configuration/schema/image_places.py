"""The place of the images of an entry of the dataset json: of a dataset, of masks or of references."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo

from simpletuner.helpers.choices.image_sources import IMAGE_SOURCES
from simpletuner.helpers.configuration.schema.base import OneOf, Section, input_folder
from simpletuner.helpers.io.names import printable


def _image_folder(value: object, info: ValidationInfo) -> Path | str:
    """A folder on this machine, or a URL of a known scheme."""
    if not isinstance(value, str) or "://" not in value:
        return input_folder(value, info)
    scheme = value.partition("://")[0].lower()
    known = [each for record in IMAGE_SOURCES.values() for each in record.schemes]
    if scheme not in known:
        urls = f", or a URL of {', '.join(f'{each}://' for each in known)}" if known else ""
        raise ValueError(f"{scheme}:// is not supported. Give a folder on this machine{urls}.")
    return value


ImageFolder = Annotated[Path | str, BeforeValidator(_image_folder)]


class ImagePlace(Section):
    """Where the images of an entry lie. They are only read."""

    id: str
    """Name of the entry, unique in the file."""
    type: Annotated[str, OneOf(IMAGE_SOURCES)] = "local"
    """Place of the images: local, a folder on this machine."""
    instance_data_dir: ImageFolder
    """Folder of the images, with its subfolders; only read."""

    @property
    def source(self) -> str:
        """Name of the record in IMAGE_SOURCES: that of the URL's scheme, else `type`."""
        if isinstance(self.instance_data_dir, Path):
            return self.type
        scheme = self.instance_data_dir.partition("://")[0].lower()
        return next(record.name for record in IMAGE_SOURCES.values() if scheme in record.schemes)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine that holds the images; None if they lie elsewhere."""
        return self.instance_data_dir if isinstance(self.instance_data_dir, Path) else None

    @property
    def place(self) -> str:
        """Where the images lie, in words for people."""
        return printable(str(self.instance_data_dir))
