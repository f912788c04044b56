"""A hub on this machine's loopback that speaks enough of the protocol for the ordinary client to upload."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN = "hf_loopbackonlyloopbackonly"
OWNER = "somebody"
MOST_REQUESTS = 500
JSON = {"Content-Type": "application/json"}
Answer = tuple[int, dict[str, str], object]


@dataclass
class Repo:
    """A repository of the server."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    """Title and paths of each commit."""


@dataclass
class HubServer:
    """Repositories, large files by hash, and failures to come."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""
    bodies: list[bytes] = field(default_factory=list)
    has_chunks: bool = False
    """Large files came by the Xet protocol; a repository then holds their hashes."""
    failures: dict[str, list[int | str]] = field(default_factory=dict)
    """Pattern of a request -> statuses to answer with, in place of the answer, or "broken" for none."""
    retry_after: str = "0"
    hangs: str = ""
    """Pattern of the requests that get no answer until the server ends."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process asks this server, by the large-file protocol."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }

    def add(self, name: str, *, private: bool, **files: bytes) -> Repo:
        """Make a repository."""
        self.repos[name] = Repo(private, dict(files))
        return self.repos[name]

    def failure(self, request: str) -> int | str | None:
        """The failure that a request meets."""
        for pattern, failures in self.failures.items():
            if failures and re.search(pattern, request):
                return failures.pop(0)
        return None

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        """Status, headers and content of an answer."""
        if path.startswith("/storage/"):  # its address is the permission
            return self._store(path.removeprefix("/storage/"), body)
        if path.startswith("/cas/"):
            return self._cas(path)
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, JSON, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            return (
                200,
                JSON,
                {"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}},
            )
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, JSON, {"errors": [], "warnings": []}
        return self._of_repository(method, path, body)

    def _of_repository(self, method: str, path: str, body: bytes) -> Answer:
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path) or re.fullmatch(
            r"/([^/]+/[^/]+)\.git(/info/lfs/objects/batch)", path
        )
        name, rest = (match[1], match[2] or "") if match else ("", "")
        if name not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        if rest.startswith("/preupload/"):
            return 200, JSON, {"files": [self._mode(each, name) for each in json.loads(body)["files"]]}
        if rest == "/info/lfs/objects/batch":
            return (
                200,
                JSON,
                {"transfer": "basic", "objects": list(map(self._object, json.loads(body)["objects"]))},
            )
        if rest.startswith("/xet-write-token/"):
            until = int(time.time()) + 3600
            return 200, JSON, {"casUrl": f"{self.address}/cas", "accessToken": "store", "exp": until}
        if rest.startswith("/commit/"):
            return self._commit(self.repos[name], body, name)
        info = {"id": name, "private": self.repos[name].private, "sha": "0" * 40, "siblings": []}
        return (200, JSON, info) if method in ("GET", "HEAD") else (404, JSON, {"error": "unknown"})

    def _cas(self, path: str) -> Answer:
        """The store of the Xet protocol, which takes chunks that it does not open."""
        if "/v1/xorbs/" in path:
            self.has_chunks = True
            return 200, JSON, {"was_inserted": True}
        return (200, JSON, {"result": 1}) if path.endswith("/v1/shards") else (404, JSON, {})

    def _create(self, wanted: dict[str, str]) -> Answer:
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if name.partition("/")[0] != OWNER:
            return 403, JSON, {"error": "You have no right to create a repository under this namespace"}
        if name in self.repos:
            return 409, JSON, {"error": "You already created this model repo"}
        self.add(name, private=wanted.get("visibility") == "private")
        return 200, JSON, {"url": f"{self.address}/{name}", "name": name}

    def _mode(self, file: dict[str, object], name: str) -> dict[str, object]:
        path = str(file["path"])
        known = self.repos[name].files.get(path)
        oid = None if known is None else hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
        mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
        return {
            "path": path,
            "uploadMode": mode,
            "shouldIgnore": False,
            "oid": oid if mode == "regular" else None,
        }

    def _object(self, wanted: dict[str, object]) -> dict[str, object]:
        oid = str(wanted["oid"])
        if oid in self.objects:  # nothing to do
            return {"oid": oid, "size": wanted["size"]}
        upload = {"href": f"{self.address}/storage/{oid}?signature=secret"}
        return {"oid": oid, "size": wanted["size"], "actions": {"upload": upload}}

    def _store(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, JSON, {"error": "the content does not match its hash"}
        self.objects[oid] = body
        return 200, {}, b""

    def _commit(self, repo: Repo, body: bytes, name: str) -> Answer:
        head, *operations = [json.loads(line) for line in body.splitlines()]
        for each in operations:
            value = each["value"]
            if each["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif self.has_chunks:
                repo.files[value["path"]] = value["oid"].encode()
            elif value["oid"] in self.objects:
                repo.files[value["path"]] = self.objects[value["oid"]]
            else:
                return 400, JSON, {"error": f"{value['path']} was not uploaded"}
        repo.commits.append((head["value"]["summary"], [each["value"]["path"] for each in operations]))
        address = f"{self.address}/{name}/commit/{len(repo.commits):040d}"
        return 200, JSON, {"commitUrl": address, "commitOid": f"{len(repo.commits):040d}"}


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        hub, path, body = self.server.hub, urlsplit(self.path).path, self._body()
        request = f"{self.command} {path}"
        hub.requests.append(request)
        hub.bodies.append(body)
        assert len(hub.requests) < MOST_REQUESTS, "the client does not end"
        if hub.hangs and re.search(hub.hangs, request):
            self.server.ended.wait(60)
        failure = hub.failure(request)
        if failure == "broken":
            self.close_connection = True
            self.connection.close()
            return
        if failure is not None:
            fields = JSON | {"Retry-After": hub.retry_after}
            self._send(int(failure), fields, {"error": "refused by the test"})
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._send(*hub.answer(self.command, path, headers, body))

    def _send(self, status: int, fields: dict[str, str], content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (fields | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server of one hub on a free port of the loopback."""

    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.ended = hub, threading.Event()
        hub.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that was ended takes no answer."""


@contextmanager
def serve(hub: HubServer) -> Iterator[HubServer]:
    """Answer until the context ends."""
    server = Server(hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
