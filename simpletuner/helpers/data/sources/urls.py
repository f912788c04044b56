"""Files behind http and https URLs, read whole."""

from __future__ import annotations

import base64
import http.client
import time
import urllib.error
import urllib.request
from threading import Lock
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from simpletuner.helpers.errors import DataError, UnreachableError
from simpletuner.helpers.io.names import one_line_reason, printable

TIMEOUT_S = 30.0
WAITS_S = (1.0, 4.0)
"""Between the attempts, of which there is one more."""
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_CHUNK = 1 << 20


class UrlReader:
    """Reads URLs, with three attempts each; remembers which hosts answer.

    A host that never answered is given up at once when it is asked again: lists of URLs hold dead hosts. One
    that answered before and then does not is down, which ends the run instead of leaving its images out.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._answered: set[str] = set()
        self._dead: dict[str, str] = {}

    def read(self, url: str, *, limit: int) -> bytes:
        """The bytes behind a URL.

        Raises:
            DataError: The server refuses it, it is larger than the limit, or its host never answered.
            UnreachableError: Its host answered before, and now it does not.
        """
        host = urlsplit(url).netloc.rpartition("@")[2]
        with self._lock:
            if host in self._dead:
                raise DataError(self._dead[host])
        reason = ""
        for wait in (*WAITS_S, None):
            try:
                data = _read(url, limit)
            except urllib.error.HTTPError as error:
                with self._lock:
                    self._answered.add(host)
                if error.code not in _TEMPORARY:
                    raise DataError(f"its server answers {error.code} {error.reason}") from error
                reason = f"answers {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                reason = f"does not answer: {one_line_reason(error)}"
            except ValueError as error:
                raise DataError(f"it is no URL: {one_line_reason(error)}") from error
            else:
                with self._lock:
                    self._answered.add(host)
                return data
            if wait is not None:
                time.sleep(wait)
        attempts = len(WAITS_S) + 1
        found = f"its host {printable(host)} {reason}, after {attempts} attempts"
        with self._lock:
            if host in self._answered:
                raise UnreachableError(f"{shown_url(url)}: {found}. Start the run again when it does.")
            self._dead[host] = found
        raise DataError(found)


def shown_url(url: str) -> str:
    """A URL without user, password, query and fragment, which may be secrets."""
    parts = urlsplit(url)
    return printable(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))


def _read(url: str, limit: int) -> bytes:
    request = urllib.request.Request(_ascii(url), headers={"User-Agent": "simpletuner-t"})
    if user := urlsplit(url).netloc.rpartition("@")[0]:
        login = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        parts, size = [], 0
        while chunk := answer.read(_CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if size > limit:
                raise DataError(f"it is over {limit} bytes")
        expected = answer.headers.get("Content-Length")
    if expected is not None and expected.isdecimal() and size < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - size)
    return b"".join(parts)


def _ascii(url: str) -> str:
    """The URL without user and password, and with what is not ASCII escaped, as browsers do."""
    parts = urlsplit(url)
    path, query = quote(parts.path, safe="/%:@!$&'()*+,;=~"), quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, query, ""))
