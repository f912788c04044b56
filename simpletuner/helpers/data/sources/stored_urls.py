"""Files behind URLs of remote storage that no listing named, as the cells of a table do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

from simpletuner.helpers.io.storage import Storage

_UNLISTED = (-1, "unknown", "")
"""Signature of a file of which not even the size is known."""


class StoredUrls:
    """Reads them; each bucket or server is connected once."""

    def __init__(self, opened: Callable[[str], Storage]) -> None:
        """`opened` gives the storage below a URL."""
        self._opened, self._lock = opened, Lock()
        self._storages: dict[str, Storage] = {}

    def begin(self, url: str, *, limit: int) -> Future[bytes]:
        """Begin to read a file of at most `limit` bytes; errors as in `Storage.reading`.

        Raises:
            MissingDependencyError: The package of its file system is not installed.
            SourceError: The server refuses the connection, or does not answer.
        """
        scheme, _, rest = url.partition("://")
        bucket, _, name = rest.partition("/")
        root = f"{scheme.lower()}://{bucket}"
        with self._lock:
            if root not in self._storages:
                self._storages[root] = self._opened(root)
        return self._storages[root].reading(name, _UNLISTED, limit=limit)
