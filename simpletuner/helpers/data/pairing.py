"""The files of another folder that belong to a dataset's images: by the same path without its suffix."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.data.index import ImageIndex, ImageInfo
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.data.sources.base import FoundFile
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.io.names import counted, printable


@dataclass(frozen=True, slots=True)
class Pair:
    """The file that belongs to an image."""

    file: FoundFile
    info: ImageInfo
    size: Size


@dataclass(slots=True)
class PairFinder:
    """Finds the file of an entry that belongs to each image; notes missing, ambiguous and misshapen ones.

    Two images of a dataset do not share one.
    """

    entry: ConditioningConfig | ReferenceConfig
    index: ImageIndex
    """Of the entry's folder."""
    noun: str
    """What the files are: mask or reference."""
    keeps_aspect: bool
    """Whether a file must have the aspect ratio of its image."""
    remedy: str = ""
    """What may stand for a missing file."""
    _files: dict[str, list[FoundFile]] = field(init=False, default_factory=dict)
    """Path in the folder without suffix -> the files of that name."""
    _owners: dict[str, str] = field(init=False, default_factory=dict)
    """Path of an image without suffix -> the first image of that path."""
    _shared: list[str] = field(init=False, default_factory=list)
    _missing: list[str] = field(init=False, default_factory=list)
    _ambiguous: list[str] = field(init=False, default_factory=list)
    _misshapen: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        index = self.index
        files = scan_entry(self.entry, cache=index.folder, is_read_only=index.is_read_only).images
        index.expect(files)
        for file in files:
            self._files.setdefault(os.path.splitext(file.name)[0], []).append(file)

    def pair_of(self, image: FoundFile, image_px: Size) -> Pair | str:
        """The file of a usable image, or the reason why the image cannot be used."""
        name, stem = printable(image.name), os.path.splitext(image.name)[0]
        found = self._files.get(stem, [])
        if len(found) != 1:
            names = ", ".join(printable(each.name) for each in found)
            (self._ambiguous if found else self._missing).append(f"{name} ({names})" if found else name)
            return f"{len(found)} {self.noun}s have its name"
        owner = self._owners.setdefault(stem, name)
        if owner != name:
            self._shared.append(f"{owner} and {name}")
            return f"its {self.noun} belongs to {owner}"
        info = self.index.info(found[0])
        if info.size is None:
            return f"its {self.noun} {printable(found[0].name)} cannot be used: {info.problem}"
        if self.keeps_aspect and not has_aspect(info.size, image_px):
            self._misshapen.append(f"{name} ({image_px}, its {self.noun} {info.size})")
            return f"its {self.noun} has another aspect ratio"
        return Pair(found[0], info, info.size)

    def problems(self) -> list[str]:
        """Why the files so far cannot be used, as sentences without their ends."""
        found = {
            f"no {self.noun} in {self.entry.place}. Add a file of the same path and name, but for its suffix"
            f"{self.remedy}": self._missing,
            f"several {self.noun}s in {self.entry.place}. Keep one of each": self._ambiguous,
            f"the {self.noun} of another image in {self.entry.place}. Rename one of the two, and add its "
            f"{self.noun}": self._shared,
            f"a {self.noun} of another aspect ratio. Crop it to the image's": self._misshapen,
        }
        return [
            f"{counted(len(names), 'image has', 'images have')} {text}: {listed(names)}"
            for text, names in found.items()
            if names
        ]


def has_aspect(other_px: Size, image_px: Size) -> bool:
    """Whether one size is the other one enlarged, but for edges rounded by less than a pixel."""
    error_px2 = abs(other_px.width * image_px.height - other_px.height * image_px.width)
    return error_px2 < max(other_px.width, other_px.height, image_px.width, image_px.height)
