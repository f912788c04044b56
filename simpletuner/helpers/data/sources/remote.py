"""A folder in remote storage: a bucket, a server reached by ssh, or a web server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from simpletuner.helpers.choices.captions import caption_suffixes, caption_tables
from simpletuner.helpers.choices.image_files import image_suffixes
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, RangedSource
from simpletuner.helpers.io.storage import CONNECT_S, IDLE_S, MOST_REQUESTS, Storage, StoredFile, open_storage

MOST_BYTES_AHEAD = 128 << 20
_UNKNOWN_BYTES = 4 << 20
"""Of a file whose server does not state its size, when memory is reckoned."""


class RemoteFolder(RangedSource[StoredFile]):
    """The files below a URL, listed once and read whole.

    Hidden files are ignored, objects whose keys are no plain paths are skipped with a reason. Files that are
    expected are read ahead, MOST_REQUESTS at a time and MOST_BYTES_AHEAD at most.
    """

    reads_ahead = True

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._expected: OrderedDict[str, FoundFile] = OrderedDict()
        self._ahead: dict[str, tuple[FoundFile, Future[bytes]]] = {}

    @property
    def place(self) -> str:
        """The URL without credentials."""
        return self._storage.place

    def list(self) -> Iterator[tuple[str, StoredFile | str]]:
        """(name, file or reason to skip it) of each file.

        Raises:
            SourceError: The files cannot be listed.
        """
        suffixes = (*caption_suffixes(), *caption_tables(), *image_suffixes(), ".tar")
        for file in self._storage.files(lambda name: name.lower().endswith(suffixes)):
            parts = file.name.split("/")
            if not all(part.strip(".") for part in parts) or "\0" in file.name:
                yield file.name, "its key is no plain path: a part of it is empty, . or .."
            elif not any(part.startswith(".") for part in parts):
                yield file.name, file

    def stat(self, name: str, entry: StoredFile) -> FoundFile | str:
        """A listed file; nothing is asked of the server."""
        return FoundFile(self, name, entry.signature)

    def read(self, file: FoundFile, *, limit: int) -> bytes:
        """The bytes of a file of at most `limit` bytes.

        Raises:
            DataError: The file is larger or gone; the message does not name it.
            SourceError: It cannot be read, or has another size than in the listing.
        """
        with self._lock:
            _, ahead = self._ahead.pop(file.name, (None, None))
            self._expected.pop(file.name, None)
            self._read_ahead()
        data = self._begun(file, limit).result() if ahead is None else ahead.result()
        return data if len(data) <= limit else self._begun(file, limit).result()

    def read_range(self, file: FoundFile, start: int, length: int) -> bytes:
        """A part of a file.

        Raises:
            DataError: The file is gone; the message does not name it.
            SourceError: It cannot be read.
        """
        size = int(file.signature[0])
        length = length if size < 0 else min(length, size - start)
        return self._storage.reading_range(file.name, start, length).result() if length > 0 else b""

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read files that will be asked for, in this order."""
        with self._lock:
            for _, future in self._ahead.values():
                future.cancel()
            self._ahead = {}
            self._expected = OrderedDict((file.name, file) for file in files)
            self._read_ahead()

    def changed_ns(self, file: FoundFile) -> int:
        """When a file without a version last changed."""
        _, kind, value = file.signature
        return int(value) if kind == "time" else 0

    def _read_ahead(self) -> None:
        waiting = sum(map(_num_bytes, (file for file, _ in self._ahead.values())))
        while self._expected and len(self._ahead) < MOST_REQUESTS:
            name, file = self._expected.popitem(last=False)
            waiting += _num_bytes(file)
            if self._ahead and waiting > MOST_BYTES_AHEAD:
                self._expected[name] = file
                self._expected.move_to_end(name, last=False)
                return
            self._ahead[name] = file, self._begun(file, MAX_FILE_BYTES)

    def _begun(self, file: FoundFile, limit: int) -> Future[bytes]:
        return self._storage.reading(file.name, file.signature, limit=limit)


def remote_folder(entry: ImagePlace) -> RemoteFolder:
    """The folder of an entry of the dataset json.

    Raises:
        MissingDependencyError: The package of its file system is not installed.
        SourceError: The server refuses the connection, or does not answer.
    """
    return RemoteFolder(open_storage(str(entry.instance_data_dir)))


def s3_folder(entry: ImagePlace) -> RemoteFolder:
    """The folder of an entry in S3, with the entry's own keys; others come from the environment.

    Raises:
        MissingDependencyError: s3fs is not installed.
    """
    key, secret = entry.aws_access_key_id, entry.aws_secret_access_key
    options: dict[str, Any] = {
        "key": key and key.get_secret_value(),
        "secret": secret and secret.get_secret_value(),
        "endpoint_url": entry.aws_endpoint_url,
        "client_kwargs": {"region_name": entry.aws_region_name} if entry.aws_region_name else {},
        "config_kwargs": {
            "connect_timeout": CONNECT_S,
            "read_timeout": IDLE_S,
            "max_pool_connections": MOST_REQUESTS,
            "retries": {"total_max_attempts": 1},  # tries are counted in io/storage
        },
    }
    return RemoteFolder(open_storage(str(entry.instance_data_dir), **options))


def _num_bytes(file: FoundFile) -> int:
    size = int(file.signature[0])
    return _UNKNOWN_BYTES if size < 0 else size
