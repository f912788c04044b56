"""A server on this machine that keeps what it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

TOKEN = "a-token-that-nobody-may-see"


@dataclass
class Receiver:
    """What arrived, and what is answered."""

    port: int
    status: int = 204
    location: str | None = None
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """(path, headers, body) of each."""

    @property
    def url(self) -> str:
        """The address, with a token in it."""
        return f"http://127.0.0.1:{self.port}/{TOKEN}"

    def objects(self) -> list[dict[str, Any]]:
        """The bodies, as json."""
        return [json.loads(body) for _, _, body in self.requests]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver that listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.requests.append((self.path, dict(self.headers), body))
            self.send_response(made.status)
            if made.location is not None:
                self.send_header("Location", made.location)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    made = Receiver(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
