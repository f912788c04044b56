"""Datasets of the Hugging Face hub, or in its format on this machine, read by `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.data.sources.arrow import EXTRA, ArrowTable
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, ImageSource
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.data.sources.rows import ImageRows, PathRows, columns_of
from simpletuner.helpers.data.sources.tables import Rows, split_column
from simpletuner.helpers.errors import DataError, UnreachableError
from simpletuner.helpers.io.names import counted, one_line_reason, printable
from simpletuner.helpers.io.optional import require

logger = logging.getLogger(__name__)

# Base class of the HTTP client's errors; the client differs between versions of huggingface_hub.
_TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# What `save_to_disk` writes for one split, and for several.
_SAVED = ("dataset_info.json", "dataset_dict.json")


class HubTable(ArrowTable):
    """The rows of a map-style dataset: Arrow files that `datasets` maps into memory and never changes."""

    def __init__(self, dataset: Any, *, place: str) -> None:
        self._table: Any = dataset.with_format("arrow")[:]
        super().__init__(self._table.schema, place=place)
        self._digest = _digest([Path(each["filename"]) for each in dataset.cache_files], self._table)
        self._files = LocalFolder(Path.cwd())
        self._image = ""

    def read(self, columns: Iterable[str]) -> Rows:
        """The cells of some columns."""
        return self.cells_of(self._table, columns, num_rows=self._table.num_rows)

    def images(self, column: str) -> HubTable | None:
        """Itself if the cells are bytes, or objects with a field `bytes`."""
        self._image = column
        return self if self.holds_bytes(column) else None

    def signature(self, row: int) -> tuple[int | str, ...]:
        """The digest of the dataset and the row; of an image outside them also the state of its file."""
        path = self._path(self._cell(self._image, row))
        if path is None:
            return (self._digest, row)
        try:
            status = path.stat()
        except OSError:
            return (self._digest, row, 0)
        return (self._digest, row, status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino)

    def cell(self, column: str, row: int) -> object:
        """The bytes of an image, which lie in the row or in the file that it names."""
        cell = self._cell(column, row)
        path = self._path(cell)
        if path is None:
            return cell.as_py()
        return self._files.read(FoundFile(self._files, str(path), ()), limit=MAX_FILE_BYTES)

    def _cell(self, column: str, row: int) -> Any:
        """An Arrow scalar, which shares the memory of the table."""
        top, fields = split_column(column, self.columns) or (column, ())
        cell = self._table.column(top)[row]
        for each in fields:
            cell = cell[each]
        return cell

    def _path(self, cell: Any) -> Path | None:
        """The file of an image that the row only names; None if the row holds bytes, or nothing."""
        if not self.arrow.types.is_struct(cell.type) or not cell.is_valid or cell["bytes"].is_valid:
            return None
        has_path = cell.type.get_field_index("path") >= 0 and cell["path"].is_valid
        return Path(cell["path"].as_py()) if has_path else None


def _digest(files: Sequence[Path], table: Any) -> str:
    """What changes when a dataset does: the states of its files, or the content of one that has none.

    `datasets` reads a dataset up to HF_DATASETS_IN_MEMORY_MAX_SIZE into memory and then names no files.
    """
    hashed = xxhash.xxh3_64()
    if files:
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        hashed.update(repr(states).encode())
        return hashed.hexdigest()
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        hashed.update(repr((chunk.offset, len(chunk))).encode())
        for buffer in filter(None, chunk.buffers()):
            hashed.update(memoryview(buffer))
    return hashed.hexdigest()


def hub_rows(entry: ImagePlace) -> ImageSource[Any]:
    """The images of an entry with type huggingface; the dataset is downloaded on first use.

    Raises:
        DataError: There is no such dataset, split or column, or it cannot be read.
        UnreachableError: The hub does not answer, and the dataset is not in its cache.
        MissingDependencyError: datasets is not installed.
    """
    split = entry.split or "train"
    table = HubTable(_loaded(entry, split), place=f"{entry.place} ({printable(split)})")
    columns = columns_of(table, entry)
    if images := table.images(columns.image):
        return ImageRows(table, images, columns, prefix=f"{split}/")
    base = Path(str(entry.dataset_name)) if not entry.needs_download else Path.cwd()
    return PathRows(table, columns, base=base, takes_absolute=False, entry=entry)


def _loaded(entry: ImagePlace, split: str) -> Any:
    """The map-style dataset of an entry."""
    datasets: Any = require("datasets", extra=EXTRA)
    name = str(entry.dataset_name)
    first = entry.max_num_samples if isinstance(entry, DatasetConfig) and entry.streaming else None
    if entry.needs_download and not constants.HF_HUB_OFFLINE:
        logger.info("Looking for %s at %s/datasets.", entry.place, constants.ENDPOINT)
    source = {"path": name, "split": split, "revision": entry.revision}
    try:
        if any((Path(name) / each).exists() for each in _SAVED):
            return _of_split(datasets.load_from_disk(name), split)
        if first is not None:
            logger.info("Taking the first %s of %s.", counted(first, "row"), entry.place)
            return datasets.Dataset.from_generator(_first_rows, gen_kwargs={**source, "number": first})
        return datasets.load_dataset(**source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, _TRANSPORT_ERROR) as error:
        raise _explained(entry, error) from error


def _first_rows(path: str, *, split: str, revision: str | None, number: int) -> Iterator[dict[str, object]]:
    """The first rows of a stream, with images as they are stored."""
    datasets: Any = require("datasets", extra=EXTRA)
    stream = datasets.load_dataset(path, split=split, revision=revision, streaming=True)
    yield from stream.decode(False).take(number)


def _of_split(saved: Any, split: str) -> Any:
    """The split of a folder that `save_to_disk` wrote; a single dataset has any."""
    if not isinstance(saved, Mapping):
        return saved
    if split not in saved:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(saved)}.')
    return saved[split]


def _explained(entry: ImagePlace, error: Exception) -> DataError | UnreachableError:
    """The error for people of a dataset that cannot be loaded."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and isinstance(cause, Exception):
        causes.append(cause)
    place = f"dataset_name {entry.place}"
    if any(isinstance(each, ConnectionError) for each in causes) and entry.needs_download:
        why = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        )
        return UnreachableError(
            f"{place}: it is not in the hub's cache, and {why}. Start once with a connection to download it, "
            "or give the folder of a dataset on this machine."
        )
    reason = one_line_reason(causes[-1] if str(causes[-1]) else error).rstrip(".")
    if entry.needs_download and type(error).__name__ == "DatasetNotFoundError":
        return DataError(
            f"{place}: {reason}. Correct the name. For a private or gated dataset accept its terms at "
            f"{constants.ENDPOINT}/datasets/{entry.place}, then run hf auth login or set HF_TOKEN."
        )
    remedy = "Correct split." if "split" in reason else "Correct dataset_name, split or revision."
    return DataError(f"{place}: it cannot be loaded: {reason}. {remedy}")
