"""Remote storage through fsspec: one listing of all files below a URL, and whole files within limits.

Every request is tried ATTEMPTS times. All of them run on fsspec's own thread, many at a time.
"""

from __future__ import annotations

import asyncio
import html
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote

from simpletuner.helpers.errors import DataError, SourceError, UnreachableError
from simpletuner.helpers.io.names import counted, one_line_reason, printable
from simpletuner.helpers.io.optional import require
from simpletuner.helpers.io.redaction import redacted

ATTEMPTS = 4
"""Tries of a request."""
PAUSE_S = 0.5
"""After the first of them; twice as long after each further one."""
CONNECT_S = 10
IDLE_S = 30
"""Longest wait for a connection, and for the next bytes."""
LONGEST_READ_S = 70
LONGEST_LISTING_S = 600
"""Longest time of one try to read a file, so that all of them end within the default of
loader_timeout_seconds, and to list all files."""
MOST_REQUESTS = 32
"""At a time."""
MOST_FOLDERS = 100_000
"""A server whose index pages link in a circle is given up then."""

T = TypeVar("T")
Signature = tuple[int | str, ...]
"""(bytes or -1, "version", version), (bytes or -1, "time", ns since 1970), or one that never comes again."""
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Content-MD5")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "Last-Modified")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a listing."""

    name: str
    """Relative to the URL."""
    signature: Signature


class Storage(ABC):
    """The files below one URL. Methods are called from any thread.

    Raises:
        MissingDependencyError: The file system's package is not installed.
        SourceError: The server refuses the connection, or does not answer.
    """

    file_system: ClassVar[str]
    """fsspec's implementation as "module:class"."""
    extra: ClassVar[str]
    """Extra of this package that installs it."""
    advice: ClassVar[str]
    """Where its credentials come from."""
    failures: ClassVar[tuple[str, ...]] = ()
    """Errors of its library beside OSError and ValueError, as "module:class"."""
    refusals: ClassVar[tuple[str, ...]] = ()
    """Those of them that mean missing or wrong credentials."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self.place = printable(redacted(self.url))
        self._class = self._implementation()
        self._failures: tuple[type[Exception], ...] = (OSError, ValueError, *_classes(self.failures))
        self._refusals: tuple[type[Exception], ...] = (PermissionError, *_classes(self.refusals))
        self._options = options
        self._fs = self._opened()
        self._root: str = self._class._strip_protocol(self.url).rstrip("/")

    def files(self, is_wanted: Callable[[str], bool]) -> list[StoredFile]:
        """All files, with sizes and versions; of those whose names are not wanted perhaps without.

        Raises:
            SourceError: They cannot be listed.
        """
        return self._soon(self._tried(lambda: self._listed(is_wanted), self.url, LONGEST_LISTING_S)).result()

    def reading(self, name: str, signature: Signature, *, limit: int) -> Future[bytes]:
        """Begin to read a listed file of at most `limit` bytes.

        The result raises DataError, which does not name the file, if it is gone or larger, and SourceError if
        it cannot be read or has another size than in the listing.
        """
        size = int(signature[0])
        return self._soon(
            self._tried(lambda: self._read(name, size, limit), f"{self.url}/{name}", LONGEST_READ_S)
        )

    def reading_range(self, name: str, start: int, length: int) -> Future[bytes]:
        """Begin to read a part of a listed file, or what there is of it; errors as in `reading`."""
        return self._soon(
            self._tried(lambda: self._part(name, start, length), f"{self.url}/{name}", LONGEST_READ_S)
        )

    async def _part(self, name: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        try:
            data: bytes = await self._fs._cat_file(self._address(name), start=start, end=start + length)
        except FileNotFoundError as error:
            raise DataError("there is no such file any more") from error
        if len(data) > length:
            raise ConnectionError("its server gives no parts of files")
        return data

    def _address(self, name: str) -> str:
        """What fsspec calls a listed file."""
        return f"{self._root}/{name}"

    @abstractmethod
    async def _listed(self, is_wanted: Callable[[str], bool]) -> list[StoredFile]: ...

    @abstractmethod
    async def _bytes(self, name: str, most: int) -> bytes:
        """The first bytes of a file: all of them, or more than `most`."""

    async def _read(self, name: str, size: int, limit: int) -> bytes:
        if size > limit:
            raise DataError(f"it is over {limit} bytes")
        if size == 0:
            return b""
        try:
            data = await self._bytes(name, limit if size < 0 else size)
        except FileNotFoundError as error:
            raise DataError("there is no such file any more") from error
        if size < 0 and len(data) > limit:
            raise DataError(f"it is over {limit} bytes")
        if size >= 0 and len(data) != size:
            found = f"{len(data)}" if len(data) < size else "more"
            raise ConnectionError(f"{found} bytes arrived of {size}; it was changed or the connection broke")
        return data

    def _implementation(self) -> Any:
        """The class that fsspec's file system is made of."""
        module, _, name = self.file_system.partition(":")
        return getattr(require(module, extra=self.extra), name)

    def _opened(self) -> Any:
        """Fsspec's file system, with connections of its own."""
        options = self._class._get_kwargs_from_urls(self.url) | self._options
        try:
            return self._class(skip_instance_cache=True, **options)
        except self._failures as error:
            raise self._in_words(error, self.url) from error

    def _soon(self, work: Awaitable[T]) -> Future[T]:
        async def awaited() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(awaited(), self._fs.loop)

    async def _tried(self, work: Callable[[], Awaitable[T]], url: str, longest_s: float) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            file_system = self._fs
            try:
                async with asyncio.timeout(longest_s):
                    return await work()
            except self._failures as error:
                if attempt == ATTEMPTS or self._is_final(error):
                    raise self._in_words(error, url) from error
            await asyncio.sleep(PAUSE_S * 2 ** (attempt - 1))
            await self._reconnect(file_system)
        raise AssertionError("the last try returns or raises")

    async def _reconnect(self, broken: Any) -> None:
        """Connect again after a failure, where the library does not by itself."""
        del broken

    def _is_final(self, error: Exception) -> bool:
        """Whether another try would fail as well."""
        mistaken = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | ValueError)
        return mistaken or self._is_refused(error) or _status(error) in range(400, 408)

    def _is_refused(self, error: Exception) -> bool:
        """Whether the server wants other credentials."""
        return isinstance(error, self._refusals) or _status(error) in (401, 403)

    def _in_words(self, error: Exception, url: str) -> SourceError:
        place, reason = printable(redacted(url)), one_line_reason(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            return SourceError(f"{place}: there is no such bucket or folder. Check instance_data_dir.")
        if self._is_refused(error):
            return SourceError(f"{place}: access is denied ({reason}). {self.advice}")
        if self._is_final(error):
            remedy = self.advice if isinstance(error, ValueError) else "Check instance_data_dir."
            return SourceError(f"{place}: it cannot be read: {reason.rstrip('.!')}. {remedy}")
        if isinstance(error, TimeoutError):
            reason = "it takes too long"
        return UnreachableError(
            f"{place}: it cannot be read in {counted(ATTEMPTS, 'try', 'tries')}: {reason}. "
            "Check the network and the address, then start again."
        )


class ObjectStore(Storage):
    """A bucket: its listing has the size and the version of each object."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        super().__init__(url, {"use_listings_cache": False} | dict(options))

    async def _listed(self, is_wanted: Callable[[str], bool]) -> list[StoredFile]:
        found: dict[str, dict[str, Any]] = await self._fs._find(self._root, detail=True)
        if self._root in found:
            raise NotADirectoryError("it is an object, not a folder")
        start = len(self._root) + 1
        return [
            StoredFile(path[start:], signature_of(info))
            for path, info in found.items()
            if not path.endswith("/")  # stands for a folder
        ]

    async def _bytes(self, name: str, most: int) -> bytes:
        data: bytes = await self._fs._cat_file(self._address(name), start=0, end=most + 1)
        return data


class S3(ObjectStore):
    """Amazon S3, and servers that speak its protocol."""

    file_system = "s3fs:S3FileSystem"
    extra = "s3"
    advice = (
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to a key that may list and read "
        "the bucket."
    )
    failures = (
        "botocore.exceptions:BotoCoreError",
        "botocore.exceptions:ClientError",
        "aiohttp:ClientError",
    )
    refusals = (
        "botocore.exceptions:NoCredentialsError",
        "botocore.exceptions:PartialCredentialsError",
        "botocore.exceptions:CredentialRetrievalError",
        "botocore.exceptions:ProfileNotFound",
    )

    def _implementation(self) -> Any:
        return type("S3", (super()._implementation(),), {"retries": 1})  # tries are counted here


class GoogleCloud(ObjectStore):
    """Google Cloud Storage."""

    file_system = "gcsfs.core:GCSFileSystem"
    extra = "gcs"
    advice = "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS."
    failures = (
        "gcsfs.retry:HttpError",
        "google.auth.exceptions:GoogleAuthError",
        "aiohttp:ClientError",
    )
    refusals = ("google.auth.exceptions:GoogleAuthError",)

    def _is_refused(self, error: Exception) -> bool:
        return super()._is_refused(error) or str(error).startswith("Forbidden")


class Azure(ObjectStore):
    """Azure Blob Storage."""

    file_system = "adlfs:AzureBlobFileSystem"
    extra = "azure"
    advice = "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN."
    failures = ("azure.core.exceptions:AzureError", "aiohttp:ClientError")
    refusals = ("azure.core.exceptions:ClientAuthenticationError",)


class Sftp(Storage):
    """A folder of a server that is reached by ssh. Only servers in known_hosts are trusted."""

    file_system = "sshfs:SSHFileSystem"
    extra = "sftp"
    advice = (
        "`sftp` with the same server must work without a question: its key in ~/.ssh/known_hosts, yours in "
        "an ssh agent or in ~/.ssh."
    )
    failures = ("asyncssh:Error",)
    refusals = ("asyncssh:PermissionDenied", "asyncssh:HostKeyNotVerifiable", "asyncssh:KeyImportError")

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._lock = asyncio.Lock()
        super().__init__(url, {"known_hosts": (), "connect_timeout": CONNECT_S} | dict(options))

    async def _listed(self, is_wanted: Callable[[str], bool]) -> list[StoredFile]:
        found: list[StoredFile] = []
        pending = [self._root or "/"]
        while pending:
            for info in await self._fs._ls(pending.pop(), detail=True):
                name = info["name"].removeprefix(self._root).lstrip("/")
                if info["type"] == "directory":
                    pending += [] if name.rpartition("/")[2].startswith(".") else [info["name"]]
                elif info["type"] == "file":  # links may leave the folder
                    found.append(StoredFile(name, signature_of(info)))
        return found

    async def _bytes(self, name: str, most: int) -> bytes:
        return await asyncio.to_thread(self._read_now, self._address(name), most)

    def _read_now(self, path: str, most: int) -> bytes:
        with self._fs.open(path, "rb") as opened:
            data: bytes = opened.read(most + 1)
        return data

    async def _reconnect(self, broken: Any) -> None:
        async with self._lock:
            if self._fs is broken:
                self._fs = await asyncio.to_thread(self._opened)


class WebFolder(Storage):
    """A folder of a web server that shows an index page, with links to its files and folders."""

    file_system = "fsspec.implementations.http:HTTPFileSystem"
    extra = "http"
    advice = "Write https://user:password@server/folder, with {env:VARIABLE} for the password."
    failures = ("aiohttp:ClientError",)

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        timeout = require("aiohttp", extra=self.extra).ClientTimeout(
            total=None, connect=CONNECT_S, sock_read=IDLE_S
        )
        client = {"timeout": timeout, "trust_env": True}  # a proxy
        super().__init__(url, {"simple_links": False, "client_kwargs": client} | dict(options))
        self._urls: dict[str, str] = {}
        """Name -> URL as its server writes it."""

    async def _listed(self, is_wanted: Callable[[str], bool]) -> list[StoredFile]:
        urls = await self._linked()
        if not urls:
            raise NotADirectoryError("its page links to no file in it, so there is no list of the images")
        free = asyncio.Semaphore(MOST_REQUESTS)

        async def described(name: str) -> StoredFile | None:
            if not is_wanted(name):
                return StoredFile(name, signature_of({}))
            async with free:
                return await self._described(name, urls[name])

        found = await asyncio.gather(*map(described, urls))
        self._urls = urls
        return [each for each in found if each is not None]

    async def _linked(self) -> dict[str, str]:
        """Name -> URL of each file that the index pages link to."""
        urls: dict[str, str] = {}
        seen = {f"{self.url}/"}
        pending = list(seen)
        while pending and len(seen) < MOST_FOLDERS:
            for link in await self._fs._ls(pending.pop(), detail=False):
                url = html.unescape(link)
                path = url.removeprefix(f"{self.url}/")
                if path == url or not path or set("?#") & set(path):  # leads elsewhere, or sorts the page
                    continue
                if not url.endswith("/"):
                    urls[unquote(path)] = url
                elif url not in seen and not unquote(path).rstrip("/").rpartition("/")[2].startswith("."):
                    seen.add(url)
                    pending.append(url)
        if pending:
            raise NotADirectoryError(f"it has over {MOST_FOLDERS:,} folders")
        return urls

    async def _described(self, name: str, url: str) -> StoredFile | None:
        """A file with its size and version; None if its server has none."""
        try:
            return StoredFile(name, signature_of(await self._fs._info(url)))
        except FileNotFoundError as error:  # for every failure
            cause = error.__cause__
            if isinstance(cause, self._failures) and _status(cause) not in (404, 410):
                raise cause from error
            return None

    def _address(self, name: str) -> str:
        return self._urls[name]

    async def _bytes(self, name: str, most: int) -> bytes:
        opened = await self._fs.open_async(self._address(name), size=most)
        parts: list[bytes] = []
        left = most + 1
        try:
            while left > 0 and (part := await opened.read(left)):
                parts.append(part)
                left -= len(part)
        finally:
            await opened.close()
        return b"".join(parts)


STORAGE: Mapping[str, type[Storage]] = {
    **dict.fromkeys(("s3", "s3a"), S3),
    **dict.fromkeys(("gs", "gcs"), GoogleCloud),
    **dict.fromkeys(("az", "abfs", "abfss"), Azure),
    **dict.fromkeys(("sftp", "ssh"), Sftp),
    **dict.fromkeys(("http", "https"), WebFolder),
}
"""Scheme of a URL -> its storage."""


def open_storage(url: str, **options: Any) -> Storage:
    """The files below a URL.

    Args:
        url: Its scheme is in STORAGE.
        **options: Of fsspec's implementation; secrets among them go nowhere else.

    Raises:
        MissingDependencyError: The package of its file system is not installed.
        SourceError: The server refuses the connection, or does not answer.
    """
    return STORAGE[url.partition("://")[0].lower()](url, options)


def signature_of(info: Mapping[str, Any]) -> Signature:
    """What changes when a file does: its size, and its version if the server has one, else its time.

    Without either it is another one each time, so the file counts as changed.
    """
    size = info.get("size")
    known = -1 if size is None else int(size)
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
    if version is not None:
        return known, "version", version
    changed = next((info[key] for key in _TIMES if info.get(key)), None)
    if changed is None:
        return known, "unknown", secrets.token_hex(8)
    return known, "time", _nanoseconds(changed)


def _nanoseconds(changed: datetime | str) -> int:
    """A time since 1970; a text is one of HTTP."""
    moment = parsedate_to_datetime(changed) if isinstance(changed, str) else changed
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1000


def _status(error: BaseException) -> int:
    """The code of an answer by HTTP; 0 for other errors."""
    try:
        answered = import_module("aiohttp").ClientResponseError
    except ImportError:
        return 0
    return int(error.status) if isinstance(error, answered) else 0


def _classes(names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    return tuple(getattr(import_module(name.partition(":")[0]), name.partition(":")[2]) for name in names)
