"""Files that are read before they are asked for, where the first byte of each is slow to come."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from simpletuner.helpers.data.sources.base import FoundFile
from simpletuner.helpers.io.storage import MOST_REQUESTS

MOST_BYTES_AHEAD = 128 << 20
UNKNOWN_BYTES = 4 << 20
"""Of a file whose server does not state its size, when memory is reckoned."""


class ReadAhead:
    """Begins to read expected files, MOST_REQUESTS at a time and MOST_BYTES_AHEAD at most."""

    def __init__(
        self, begin: Callable[[FoundFile], Future[bytes]], *, num_bytes: Callable[[FoundFile], int]
    ) -> None:
        """`begin` starts to read a whole file, of `num_bytes`."""
        self._begin, self._num_bytes = begin, num_bytes
        self._lock = threading.Lock()
        self._expected: OrderedDict[str, FoundFile] = OrderedDict()
        self._ahead: dict[str, tuple[FoundFile, Future[bytes]]] = {}

    def expect(self, files: Iterable[FoundFile]) -> None:
        """Forget what was expected, and begin with these files, in this order."""
        with self._lock:
            for _, future in self._ahead.values():
                future.cancel()
            self._ahead = {}
            self._expected = OrderedDict((file.name, file) for file in files)
            self._fill()

    def take(self, file: FoundFile) -> Future[bytes] | None:
        """The file if it was begun; the next one is begun in its place."""
        with self._lock:
            _, ahead = self._ahead.pop(file.name, (None, None))
            self._expected.pop(file.name, None)
            self._fill()
        return ahead

    def _fill(self) -> None:
        waiting = sum(map(self._num_bytes, (file for file, _ in self._ahead.values())))
        while self._expected and len(self._ahead) < MOST_REQUESTS:
            name, file = self._expected.popitem(last=False)
            waiting += self._num_bytes(file)
            if self._ahead and waiting > MOST_BYTES_AHEAD:
                self._expected[name] = file
                self._expected.move_to_end(name, last=False)
                return
            self._ahead[name] = file, self._begin(file)


def in_thread(read: Callable[[], bytes]) -> Future[bytes]:
    """Begin to read in a thread of its own, which keeps no process alive."""
    result: Future[bytes] = Future()
    threading.Thread(target=_serve, args=(result, read), name="read ahead", daemon=True).start()
    return result


def _serve(result: Future[bytes], read: Callable[[], bytes]) -> None:
    if not result.set_running_or_notify_cancel():
        return
    try:
        result.set_result(read())
    except BaseException as error:  # noqa: BLE001 - raised again where the result is used
        result.set_exception(error)
