"""Servers of remote storage on this machine: S3, a web server with index pages, and SFTP."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "AKIATHISISNOKEY", "a-secret-that-nobody-may-see", "photos"
_REQUEST = re.compile(r'"(?:\x1b\[[\d;]*m)*([A-Z]+) (\S+) HTTP')


@dataclass
class Bucket:
    """A bucket of a server that speaks S3's protocol, and its requests."""

    address: str
    client: Any
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each."""

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Write objects; key -> bytes."""
        for key, body in objects.items():
            self.client.put_object(Bucket=BUCKET, Key=key, Body=body)

    def clear(self) -> None:
        """Remove every object, and forget the requests."""
        listed = self.client.list_objects_v2(Bucket=BUCKET)
        for each in listed.get("Contents", ()):
            self.client.delete_object(Bucket=BUCKET, Key=each["Key"])
        self.requests.clear()

    def reads(self, suffix: str = "") -> int:
        """Number of objects read whose keys end so."""
        return sum(
            method == "GET" and "?" not in path and path.endswith(suffix) for method, path in self.requests
        )


@contextmanager
def serving_s3() -> Iterator[Bucket]:
    """An empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    made = Bucket(f"http://{host}:{port}", client)
    client.create_bucket(Bucket=BUCKET)

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            made.requests += _REQUEST.findall(record.getMessage())

    logger, handler = logging.getLogger("werkzeug"), Noting()
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield made
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
        client.close()
        server.stop()


@dataclass
class Web:
    """A web server and its requests."""

    address: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each."""


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def answering(answer: Answer) -> Iterator[Web]:
    """A web server that gives every request to a function."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.requests.append((self.command, self.path))
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with _listening(Handler) as made:
        yield made


@contextmanager
def serving_folder(folder: Path) -> Iterator[Web]:
    """A web server that shows an index page of each folder, and states when a file changed."""

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            made.requests.append((self.command, self.path))
            return super().send_head()

        def log_message(self, *_: object) -> None:
            pass

    with _listening(partial(Handler, directory=str(folder))) as made:
        yield made


@contextmanager
def _listening(handler: Any) -> Iterator[Web]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Web(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """Answer a request; a header may state another length than the body has."""
    request.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


@contextmanager
def serving_sftp(folder: Path, home: Path) -> Iterator[str]:
    """An SFTP server of a folder; `home` gets the server's key among the known ones. Yields host:port.

    The user is anyone with the password SECRET.
    """
    import asyncssh

    key = asyncssh.generate_private_key("ssh-ed25519")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    class Server(asyncssh.SSHServer):
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            del username
            return password == SECRET

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Server,
            server_host_keys=[key],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder)),
        )

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result(10)
    port = acceptor.get_port()
    (home / ".ssh").mkdir(exist_ok=True)
    public = key.export_public_key().decode().strip()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(acceptor.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
