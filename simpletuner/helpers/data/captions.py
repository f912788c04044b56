"""Sources of captions; choices/captions.py has the record of each."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import PurePosixPath
from typing import Literal

import numpy as np

from simpletuner.helpers.choices.captions import CAPTION_SOURCES, text_suffixes
from simpletuner.helpers.configuration.schema.datasets import CaptionLines, DatasetConfig
from simpletuner.helpers.data.columns import Rows
from simpletuner.helpers.data.sources.base import Files, FoundFile, Scan, expect, read_bounded
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import printable

MAX_CAPTION_FILE_BYTES = 1 << 20
# Text encoders read 77 to 512 tokens: this keeps all of them and bounds the input of a tokenizer.
MAX_CAPTION_CHARACTERS = 8192


Note = Literal["missing", "empty", "shortened"]
Recall = Callable[[Files, Callable[[FoundFile], str]], Sequence[str | DataError]]
"""The text of each of these files, or why it cannot be read; it may know texts that a file held before."""


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions of one image; each time it is trained on, one of them is drawn."""

    texts: tuple[str, ...]
    """At least one; "" without a caption."""
    note: Note | None = None
    """Counted in the report."""


MISSING = Captions(texts=("",), note="missing")


@dataclass(slots=True)
class CaptionColumn:
    """The captions of many images, most of which have one."""

    firsts: list[str]
    """The first caption of each image."""
    several: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Position -> the captions of an image that has more than one."""
    notes: dict[int, Note] = field(default_factory=dict)
    """Position -> the note of an image that has one."""

    @classmethod
    def of(cls, captions: Sequence[Captions]) -> CaptionColumn:
        """The captions of each image."""
        column = cls([""] * len(captions))
        for row, each in enumerate(captions):
            column.put(row, each)
        return column

    def put(self, row: int, captions: Captions) -> None:
        """Set the captions of one image."""
        self.firsts[row] = captions.texts[0]
        if len(captions.texts) > 1:
            self.several[row] = captions.texts
        if captions.note is not None:
            self.notes[row] = captions.note

    def texts_of(self, row: int) -> tuple[str, ...]:
        """The captions of one image."""
        return self.several.get(row) or (self.firsts[row],)

    @property
    def num_texts(self) -> int:
        """Of all images."""
        return len(self.firsts) + sum(len(texts) - 1 for texts in self.several.values())


class CaptionReader(ABC):
    """Base of the caption sources: the captions of one dataset."""

    can_prepend = True
    """instance_prompt may stand before the captions."""
    reads_metadata = False
    """The captions stand in the scan's tables, metadata.jsonl or metadata.csv."""
    reads_table = False
    """The captions are cells of a table; several of an image are several cells, not lines."""

    def __init__(
        self,
        scan: Scan,
        *,
        suffix: str,
        instance_prompt: str,
        further_suffixes: tuple[str, ...] = (),
        caption_lines: CaptionLines = "choose",
        recall: Recall | None = None,
    ) -> None:
        self.scan = scan
        self.recall = recall or _read_each
        self.suffix = suffix
        self.instance_prompt = instance_prompt
        self.further_suffixes = further_suffixes
        self.caption_lines = caption_lines

    @staticmethod
    def completed(scan: Scan, config: DatasetConfig) -> Scan:
        """The scan with what the source reads elsewhere.

        Raises:
            DataError: It cannot be read.
        """
        del config
        return scan

    def caption_files(self, image: FoundFile) -> list[FoundFile]:
        """The source's files beside an image, in the order in which they are preferred.

        For each suffix that is the file with the image's name without suffix, then the one with its whole
        name: a.txt, a.png.txt, a.caption, a.png.caption.
        """
        return files_beside(image, self.scan, suffixes=self.suffixes)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the source's files, in the order in which they are preferred."""
        return tuple(filter(None, (self.suffix, *self.further_suffixes)))

    def expect(self, images: Sequence[FoundFile]) -> None:
        """Tell the source of images that their captions will be read."""
        if images and images[0].source.reads_ahead:
            expect(file for image in images for file in self.caption_files(image))

    def conflicts(self) -> list[str]:
        """One sentence per caption file that several images could claim."""
        return []

    @abstractmethod
    def read(self, file: FoundFile) -> Captions:
        """Captions of an image.

        Raises:
            DataError: They cannot be used; the message names the file and the reason.
        """

    def read_rows(self, rows: Rows) -> tuple[CaptionColumn, list[str]]:
        """The captions of the images at some positions of the scan, and why some cannot be used.

        The column is of no use if there are problems.
        """
        captions, problems = [], []
        for file in self.scan.images.take(rows):
            try:
                captions.append(self.read(file))
            except DataError as error:
                problems.append(str(error))
        return CaptionColumn.of(captions), problems

    def unusable(self, file: FoundFile) -> str | None:
        """Reason to skip an image for its caption; None to use it."""
        del file
        return None

    def unusable_rows(self, files: Files) -> dict[int, str]:
        """Position -> reason, of the images to skip for their captions."""
        if type(self).unusable is CaptionReader.unusable:
            return {}
        reasons = ((row, self.unusable(file)) for row, file in enumerate(files))
        return {row: reason for row, reason in reasons if reason is not None}


class TextFileCaptions(CaptionReader):
    """The text file beside an image, one caption per line."""

    is_plain = True
    """A text of one line is a caption as it stands."""

    @cached_property
    def _text_rows(self) -> tuple[Rows, dict[int, list[int]]]:
        """The position of the one text file of each image, -1 for none; those of images that have several."""
        images, only = self.scan.images, np.full(len(self.scan.images), -1, np.int64)
        several: dict[int, list[int]] = {}
        suffixes = self.suffixes
        if self.scan.pairs_in_order and all(
            name.lower().endswith(suffixes) for name in self.scan.texts.names
        ):
            return np.arange(len(images)), several
        for row, (stem, name) in enumerate(zip(images.stems(), images.names, strict=True)):
            found = self._beside(stem, name)
            if len(found) == 1:
                only[row] = found[0]
            elif found:
                several[row] = found
        return only, several

    def _beside(self, stem: str, name: str) -> list[int]:
        """The positions of an image's text files, in the order of `caption_files`."""
        known = self.scan.text_rows
        beside = [
            (each, self.scan.texts.names[each].lower()) for key in (stem, name) for each in known.get(key, ())
        ]
        return [each for suffix in self.suffixes for each, text in beside if text.endswith(suffix)]

    def read_rows(self, rows: Rows) -> tuple[CaptionColumn, list[str]]:
        """The captions of the images at some positions of the scan, and why some cannot be used."""
        only, several = self._text_rows[0][rows], self._text_rows[1]
        column, problems = CaptionColumn([""] * len(rows)), {}
        (with_one,) = np.nonzero(only >= 0)
        files = self.scan.texts.take(only[with_one])
        texts = self.recall(files, text_in)
        for place, (row, text) in enumerate(zip(with_one.tolist(), texts, strict=True)):
            if isinstance(text, DataError):
                problems[row] = f"{files[place].place}: {text}"
            elif self.is_plain and text and "\n" not in text and len(text) <= MAX_CAPTION_CHARACTERS:
                column.firsts[row] = text
            else:
                try:
                    column.put(row, self.captions_in(text))
                except DataError as error:
                    problems[row] = f"{files[place].place}: {error}"
        for row in np.flatnonzero(only < 0).tolist():
            try:
                column.put(
                    row, self._merged(self.scan.images[int(rows[row])], several.get(int(rows[row]), []))
                )
            except DataError as error:
                problems[row] = str(error)
        return column, [problems[row] for row in sorted(problems)]

    def _merged(self, image: FoundFile, text_rows: Sequence[int]) -> Captions:
        """The captions of an image in several text files, which must hold the same; or in none."""
        files = self.scan.texts.take(np.array(text_rows, np.int64))
        found: dict[Captions, FoundFile] = {}
        for file, text in zip(files, self.recall(files, text_in), strict=True):
            if isinstance(text, DataError):
                raise DataError(f"{file.place}: {text}") from text
            try:
                found.setdefault(self.captions_in(text), file)
            except DataError as error:
                raise DataError(f"{file.place}: {error}") from error
        if len(found) > 1:
            names = " and ".join(printable(each.name) for each in found.values())
            raise DataError(f"{names} hold different captions of {printable(image.name)}. Keep one of them")
        return next(iter(found), MISSING)

    def conflicts(self) -> list[str]:
        """One sentence per text file that several images could claim."""
        only, several = self._text_rows
        claimed = [*only[only >= 0].tolist(), *chain.from_iterable(several.values())]
        if len(set(claimed)) == len(claimed):
            return []
        claims: dict[str, list[str]] = {}
        for image in self.scan.images:
            for file in self.caption_files(image):
                claims.setdefault(file.name, []).append(printable(image.name))
        return [
            f"{printable(file)} could be the caption of {' or '.join(images)}"
            for file, images in sorted(claims.items(), key=lambda claim: os.path.splitext(claim[0])[0])
            if len(images) > 1
        ]

    def read(self, file: FoundFile) -> Captions:
        """Captions in the text file; none if there is no text file."""
        return self._merged(file, self._beside(os.path.splitext(file.name)[0], file.name))

    def captions_in(self, text: str) -> Captions:
        """The captions in the text of a file.

        Raises:
            DataError: They cannot be used; the message gives the reason only.
        """
        return captions_in_text(text, self.caption_lines)


class FileNameCaptions(CaptionReader):
    """The words of an image's name."""

    def unusable(self, file: FoundFile) -> str | None:
        """Reason to skip an image whose name is not UTF-8."""
        try:
            caption_from_name(file.name)
        except DataError as error:
            return str(error)
        return None

    def read(self, file: FoundFile) -> Captions:
        """The words of the name."""
        return caption_from_name(file.name)


class InstancePromptCaptions(CaptionReader):
    """instance_prompt for every image."""

    can_prepend = False

    def read(self, file: FoundFile) -> Captions:
        """The instance prompt."""
        del file
        return Captions(texts=(self.instance_prompt,), note=None if self.instance_prompt else "empty")


def caption_reader(config: DatasetConfig, scan: Scan, *, recall: Recall | None = None) -> CaptionReader:
    """The caption source of a dataset.

    Args:
        config: The dataset.
        scan: Its files.
        recall: Gives the texts of caption files; None reads them.

    Raises:
        DataError: It cannot be read.
        MissingDependencyError: The source's optional package is not installed.
    """
    source = CAPTION_SOURCES[strategy_of(config, scan)]
    reader: type[CaptionReader] = source.load()
    return reader(
        reader.completed(scan, config),
        suffix=source.suffix,
        instance_prompt=shortened((config.instance_prompt or "").strip()),
        further_suffixes=source.further_suffixes,
        caption_lines=config.caption_lines,
        recall=recall,
    )


def read_captions(file: FoundFile, config: DatasetConfig, reader: CaptionReader) -> Captions:
    """The captions of an image, with instance_prompt before each if that is set.

    Raises:
        DataError: They cannot be used; the message names the file and the reason.
    """
    captions = reader.read(file)
    prepends = config.prepend_instance_prompt and reader.can_prepend
    return with_instance_prompt(captions, reader.instance_prompt) if prepends else captions


def read_caption_rows(
    rows: Rows, config: DatasetConfig, reader: CaptionReader
) -> tuple[CaptionColumn, list[str]]:
    """The same for the images at some positions of the scan, and why some captions cannot be used."""
    column, problems = reader.read_rows(rows)
    if not problems and config.prepend_instance_prompt and reader.can_prepend:
        prompt = reader.instance_prompt
        column.firsts = [f"{prompt} {text}".strip() for text in column.firsts]
        column.several = {
            row: tuple(f"{prompt} {text}".strip() for text in texts) for row, texts in column.several.items()
        }
    return column, problems


def strategy_of(config: DatasetConfig, scan: Scan) -> str:
    """The caption_strategy of a dataset, chosen by its files and instance_prompt if it is not set."""
    if config.only_instance_prompt:
        return "instanceprompt"
    if config.caption_strategy is not None:
        return config.caption_strategy
    if config.parquet is not None or scan.listed is not None:
        return "table"
    if len(scan.texts) and any(text_files_beside(image, scan) for image in scan.images):
        return "textfile"
    return "instanceprompt" if config.instance_prompt and not config.prepend_instance_prompt else "filename"


def text_files_beside(image: FoundFile, scan: Scan) -> list[FoundFile]:
    """The files from which caption_strategy textfile reads the captions of an image."""
    return files_beside(image, scan, suffixes=text_suffixes())


def files_beside(image: FoundFile, scan: Scan, *, suffixes: tuple[str, ...]) -> list[FoundFile]:
    """The caption files with an image's name, by suffix; without the image's suffix first."""
    names = (os.path.splitext(image.name)[0], image.name)
    files = [file for name in names for file in scan.captions.get(name, ())]
    return [file for suffix in suffixes for file in files if file.name.lower().endswith(suffix)]


def text_in(file: FoundFile) -> str:
    """The text in a caption file, stripped, with line feeds as the ends of lines.

    Raises:
        DataError: The file cannot be read, is too large or not UTF-8; the message gives the reason only.
    """
    return decoded(read_bounded(file, limit=MAX_CAPTION_FILE_BYTES)).replace("\r\n", "\n").strip()


def captions_in_text(text: str, lines: CaptionLines) -> Captions:
    """The captions in the text of a file: one per line without blank lines, the first, or the whole text.

    A text that parses as a JSON object or array is one caption. Lines end at a line feed; other characters
    that Unicode counts as line ends stay in the caption.
    """
    parts = [text] if lines == "whole" or _is_json(text) else text.split("\n")
    texts = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not texts:
        return Captions(texts=("",), note="empty")
    return within_limit(texts[:1] if lines == "first" else texts)


def within_limit(texts: tuple[str, ...]) -> Captions:
    """Captions, each cut to the limit."""
    if all(len(text) <= MAX_CAPTION_CHARACTERS for text in texts):
        return Captions(texts=texts)
    return Captions(texts=tuple(shortened(text) for text in texts), note="shortened")


def _read_each(files: Files, read: Callable[[FoundFile], str]) -> list[str | DataError]:
    texts: list[str | DataError] = []
    expect(files)
    for file in files:
        try:
            texts.append(read(file))
        except DataError as error:
            texts.append(error)
    return texts


def caption_from_name(name: str) -> Captions:
    """The file name without folder and suffix, with spaces for underscores.

    Raises:
        DataError: The name is not UTF-8; the message gives the reason only.
    """
    stem = PurePosixPath(name).stem
    try:
        stem.encode()
    except UnicodeEncodeError as error:
        raise DataError("its name is its caption and is not UTF-8; rename it") from error
    text = " ".join(stem.replace("_", " ").split())
    return Captions(texts=(text,), note=None if text else "empty")


def with_instance_prompt(captions: Captions, instance_prompt: str) -> Captions:
    """The captions, each with the instance prompt before it."""
    texts = tuple(f"{instance_prompt} {text}".strip() for text in captions.texts)
    return Captions(texts=texts, note=captions.note)


def shortened(text: str) -> str:
    """The text, cut after the last whole word within the limit."""
    if len(text) <= MAX_CAPTION_CHARACTERS:
        return text
    cut = text[:MAX_CAPTION_CHARACTERS]
    return (cut.rpartition(" ")[0] or cut).strip()


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text, parse_int=str)  # of any length
    except (ValueError, RecursionError):
        return False
    return True


def decoded(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: It is another encoding; the message gives the reason only.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"it is not UTF-8 (byte {data[error.start]:#04x} at position {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        place = text.index("\0")
        raise DataError(f"it holds a NUL at position {place}, as UTF-16 text does; save it as UTF-8")
    return text
