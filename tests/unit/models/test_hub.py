"""Repositories: a hub on this machine's loopback, asked by the ordinary client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NOWHERE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES_PROBE = """
import sys
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import hub

repository, revision, patterns = sys.argv[1], sys.argv[2] or None, ["vae/*", "model_index.json"]
try:
    for get in (hub.cached, hub.downloaded):
        folder = get(repository, revision=revision, patterns=patterns, key="the_key")
        print(folder and sorted(path.name for path in folder.rglob("*") if path.is_file()))
except ModelError as error:
    print(f"ModelError: {error}")
"""
MODEL_PROBE = """
import torch
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.family import FamilyContext
from simpletuner.helpers.models.sdxl.family import SDXL

for variant in (None, None, "fp16"):
    model = {"model_family": "sdxl", "pretrained_model_name_or_path": "owner/model", "variant": variant}
    try:
        family = SDXL(FamilyContext(
            model=ModelConfig.model_validate(model), noise=NoiseConfig(), precision=PrecisionConfig(),
            device=torch.device("cpu"), weight_dtype=torch.float32,
        ))
        family.load_denoiser()
        family.load_vae()
        family.load_text_encoders()
        print(family.vae_identity, flush=True)
    except ModelError as error:
        print(f"ModelError: {error}")
"""


@dataclass
class FakeHub:
    """Serves one model as owner/model, refuses owner/gated, knows nothing else."""

    model: Path
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def tree(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.model.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(self.model).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for path in files
        ]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0].strip("/")
        if "owner/gated" in path:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}"
        if "owner/broken" in path:
            return 500, {}, b"{}"
        if "owner/model" not in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path.startswith("api/") and "/revision/" in path and not path.endswith(("/main", COMMIT)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if path.startswith("api/") and "/tree/" in path:
            return 200, {"Content-Type": "application/json"}, json.dumps(self.tree()).encode()
        if path.startswith("api/"):
            body = {"id": "owner/model", "sha": COMMIT, "siblings": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        content = (self.model / path.partition(f"resolve/{COMMIT}/")[2]).read_bytes()
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content


@pytest.fixture
def hub(tiny_sdxl: Path) -> Iterator[FakeHub]:
    with serve(FakeHub(tiny_sdxl)) as running:
        yield running


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(self.path)
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(
    address: str, cache: Path, repository: str, *, revision: str = "", offline: bool = False
) -> list[str]:
    """What a fresh process says when it looks for files of a repository."""
    return run(FILES_PROBE, address, cache, repository, revision, offline=offline)


def run(code: str, address: str, cache: Path, *arguments: str, offline: bool = False) -> list[str]:
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


FILES = "['config.json', 'diffusion_pytorch_model.safetensors', 'model_index.json']"


@pytest.mark.reliability_row(25)
def test_files_are_downloaded_once_and_then_found_without_a_request(hub: FakeHub, tmp_path: Path) -> None:
    assert ask(hub.address, tmp_path, "owner/model") == ["None", FILES]
    assert any("vae/diffusion" in request for request in hub.requests)
    assert not any("unet" in request for request in hub.requests)
    assert ask(NOWHERE, tmp_path, "owner/model", offline=True) == [FILES, FILES]


@pytest.mark.reliability_row(25)
def test_an_interrupted_download_is_completed(hub: FakeHub, tmp_path: Path) -> None:
    ask(hub.address, tmp_path, "owner/model")
    (weights,) = tmp_path.rglob("snapshots/*/vae/*.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    (answer,) = ask(hub.address, tmp_path, "owner/model", offline=True)[1:]
    assert "the_key owner/model: " in answer
    assert "hf auth login" in answer
    assert ask(hub.address, tmp_path, "owner/model")[1] == FILES


@pytest.mark.reliability_row(25)
def test_a_gated_repository_names_its_licence_page_and_the_command(hub: FakeHub, tmp_path: Path) -> None:
    (answer,) = ask(hub.address, tmp_path, "owner/gated")[1:]
    assert answer == (
        "ModelError: the_key owner/gated: the repository is gated. "
        f"Accept its licence at {hub.address}/owner/gated, then run: hf auth login"
    )


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        ("owner/absent", "", "no such repository on http://127.0.0.1"),
        ("owner/model", "v9", "the repository has no revision v9"),
        ("owner/broken", "", "start once with a connection"),
    ],
)
@pytest.mark.reliability_row(25)
def test_a_repository_that_cannot_be_used_is_explained(
    hub: FakeHub, tmp_path: Path, repository: str, revision: str, message: str
) -> None:
    (answer,) = ask(hub.address, tmp_path, repository, revision=revision)[1:]
    assert answer.startswith(f"ModelError: the_key {repository}: ")
    assert message in answer


@pytest.mark.reliability_row(25)
def test_an_unreachable_hub_is_explained(tmp_path: Path) -> None:
    (answer,) = ask(NOWHERE, tmp_path, "owner/model")[1:]
    assert f"{NOWHERE} cannot be reached" in answer
    assert f"{NOWHERE}/owner/model and run: hf auth login" in answer


@pytest.mark.reliability_row(25)
def test_a_cached_model_loads_without_a_request(hub: FakeHub, tmp_path: Path) -> None:
    identity, again, variant = run(MODEL_PROBE, hub.address, tmp_path)
    assert identity == again == f"vae=owner/model@{COMMIT}/vae:plain float32 mean"
    assert variant.startswith("ModelError: pretrained_model_name_or_path owner/model: component unet ")
    assert "not diffusion_pytorch_model.fp16.safetensors" in variant
    downloads = [request for request in hub.requests if "unet/diffusion" in request]
    assert len(downloads) <= 2, "one to look, one to fetch"
