"""A folder in remote storage: a bucket, a server reached by ssh, or a web server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from simpletuner.helpers.choices.captions import caption_suffixes, caption_tables
from simpletuner.helpers.choices.image_files import image_suffixes
from simpletuner.helpers.configuration.schema.image_places import ImagePlace
from simpletuner.helpers.configuration.schema.storage_keys import S3, source_of
from simpletuner.helpers.data.sources.base import MAX_FILE_BYTES, FoundFile, RangedSource
from simpletuner.helpers.data.sources.read_ahead import UNKNOWN_BYTES, ReadAhead
from simpletuner.helpers.io.storage import CONNECT_S, IDLE_S, MOST_REQUESTS, Storage, StoredFile, open_storage


class RemoteFolder(RangedSource[StoredFile]):
    """The files below a URL, listed once and read whole.

    Hidden files are ignored, objects whose keys are no plain paths are skipped with a reason. Files that are
    expected are read ahead.
    """

    reads_ahead = True

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._ahead = ReadAhead(partial(self._begun, limit=MAX_FILE_BYTES), num_bytes=_num_bytes)

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
        ahead = self._ahead.take(file)
        data = (ahead or self._begun(file, limit=limit)).result()
        return data if len(data) <= limit else self._begun(file, limit=limit).result()

    def read_range(self, file: FoundFile, start: int, length: int) -> bytes:
        """A part of a file.

        Raises:
            DataError: The file is gone; the message does not name it.
            SourceError: It cannot be read.
        """
        return self.begin_range(file, start, length).result()

    def begin_range(self, file: FoundFile, start: int, length: int) -> Future[bytes]:
        """Begin to read a part of a file; the result raises as `read_range` does."""
        size = int(file.signature[0])
        length = length if size < 0 else max(0, min(length, size - start))
        return self._storage.reading_range(file.name, start, length)

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Begin to read files that will be asked for, in this order."""
        self._ahead.expect(files)

    def changed_ns(self, file: FoundFile) -> int:
        """When a file without a version last changed."""
        _, kind, value = file.signature
        return int(value) if kind == "time" else 0

    def _begun(self, file: FoundFile, *, limit: int) -> Future[bytes]:
        return self._storage.reading(file.name, file.signature, limit=limit)


def remote_folder(entry: ImagePlace) -> RemoteFolder:
    """The folder of an entry of the dataset json.

    Raises:
        MissingDependencyError: The package of its file system is not installed.
        SourceError: The server refuses the connection, or does not answer.
    """
    return RemoteFolder(storage_of(entry, str(entry.instance_data_dir)))


def storage_of(entry: ImagePlace, url: str) -> Storage:
    """The storage below a URL; in S3 with the entry's own keys. Others come from the environment.

    Raises:
        MissingDependencyError: The package of its file system is not installed.
        SourceError: The server refuses the connection, or does not answer.
    """
    return open_storage(url, **(_s3_options(entry) if source_of(url) == S3 else {}))


def _s3_options(entry: ImagePlace) -> dict[str, Any]:
    key, secret = entry.aws_access_key_id, entry.aws_secret_access_key
    return {
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


def _num_bytes(file: FoundFile) -> int:
    size = int(file.signature[0])
    return UNKNOWN_BYTES if size < 0 else size
