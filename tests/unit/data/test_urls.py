"""Images behind URLs: a server on loopback that answers, refuses, breaks off and dies."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.caching.filling import TEXT_ENCODER, VAE
from simpletuner.helpers.caching.latents import latents_entries
from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.caching.text import text_entry
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.data import preview as preview_module
from simpletuner.helpers.data.dataset import TrainingData
from simpletuner.helpers.data.index import ImageIndex, read_unchanged
from simpletuner.helpers.data.on_demand import OnDemand
from simpletuner.helpers.data.sources import urls
from simpletuner.helpers.data.sources.base import expect, read_bounded
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.data.sources.urls import UrlReader, shown_url
from simpletuner.helpers.errors import DamagedImageError, DataError, UnreachableError
from simpletuner.helpers.io import storage
from tests.tables import png


class Server(ThreadingHTTPServer):
    """Answers with the images by path, or with the statuses to come."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.statuses: list[int] = []
        """0 breaks off in the middle."""
        self.requests: list[str] = []
        self.authorizations: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.authorizations.add(self.headers["Authorization"])
        assert len(self.server.requests) < 100, "the client does not end"
        data = self.server.files.get(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 200 if data else 404
        self.send_response(status or 200)
        if status == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/a.png")
        body = data or b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if status == 0 else body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(urls.time, "sleep", lambda _: None)
    made = Server()
    made.files = {"/a.png": png(0), "/b%20%C3%BC.png?size=1": png(1), "/b%20%C3%BC.png?size=2": png(2)}
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(10)


def test_rows_with_urls_are_images_and_their_queries_are_no_names(server: Server, tmp_path: Path) -> None:
    addresses = ["/a.png", "/b ü.png?size=1", "/b ü.png?size=2", "/gone.png"]
    lines = [f"{server.address.replace('http://', 'http://user:se%2Fcret@')}{each},x" for each in addresses]
    (tmp_path / "a.csv").write_text("\n".join(["url,caption", *lines]), encoding="utf-8")
    scan = scan_entry(DatasetConfig(id="a", type="csv", table_file=tmp_path / "a.csv"))
    names = [image.name for image in scan.images]
    assert not any("cret" in name or "size" in name for name in names)
    assert len(set(names)) == 4
    index = ImageIndex(tmp_path / "index.json")
    found = {image.name: index.info(image) for image in scan.images}
    problems = [each.problem for each in found.values() if each.problem is not None]
    assert server.authorizations == {f"Basic {base64.b64encode(b'user:se/cret').decode()}"}
    assert problems == ["its server answers 404 Not Found"]
    assert len({each.digest for each in found.values()}) == 4
    index.save()
    assert b"cret" not in (tmp_path / "index.json").read_bytes()
    number = len(server.requests)
    again = ImageIndex(tmp_path / "index.json")
    known = [image for image in scan.images if found[image.name].problem is None]
    assert [again.info(image).digest for image in known] == [found[image.name].digest for image in known]
    assert len(server.requests) == number


@pytest.mark.reliability_row(31)
@pytest.mark.parametrize("status", [0, 429, 503])
def test_a_request_that_fails_for_a_while_is_made_again(server: Server, status: int) -> None:
    server.statuses = [status, status]
    assert UrlReader().read(f"{server.address}/a.png", limit=10**6) == png(0)
    assert len(server.requests) == 3


def test_a_host_that_answered_before_and_then_does_not_ends_the_run(server: Server) -> None:
    reader = UrlReader()
    reader.read(f"{server.address}/a.png", limit=10**6)
    server.statuses = [503] * 3
    with pytest.raises(UnreachableError, match=r"/a.png: its host .* answers 503 .*, after 3 attempts"):
        reader.read(f"{server.address}/a.png?key=secret", limit=10**6)


def test_a_host_that_never_answers_is_a_reason_to_skip_and_is_asked_once() -> None:
    reader, times = UrlReader(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls.time, "sleep", times.append)
        for _ in range(3):
            with pytest.raises(
                DataError, match=r"its host 127.0.0.1:9 does not answer: .*, after 3 attempts"
            ):
                reader.read("http://127.0.0.1:9/a.png", limit=10)
    assert times == [1.0, 4.0]


def test_a_password_is_not_sent_to_another_host(server: Server) -> None:
    server.statuses = [302]
    address = server.address.replace("http://", "http://user:secret@")
    assert UrlReader().read(f"{address}/moved.png", limit=10**6) == png(0)
    assert len(server.requests) == 2
    assert None in server.authorizations


def test_a_file_above_the_limit_is_not_read_to_its_end(server: Server) -> None:
    with pytest.raises(DataError, match="it is over 100 bytes"):
        UrlReader().read(f"{server.address}/a.png", limit=100)


def test_a_url_is_shown_without_its_secrets() -> None:
    assert shown_url("https://me:secret@host/a.png?token=x#y") == "https://host/a.png"


@pytest.mark.parametrize("replaced", [png(1), b""])
def test_a_url_that_changed_is_left_out_and_read_anew_at_the_next_start(
    replaced: bytes, tmp_path: Path, server: Server
) -> None:
    server.files |= {"/a.png": png(0), "/b.png": png(5)}
    table = tmp_path / "list.csv"
    table.write_text(f"url,caption\n{server.address}/a.png,a\n{server.address}/b.png,b\n")
    config = DatasetConfig(id="a", type="table", table_file=table)
    index = ImageIndex(tmp_path / "index.safetensors")
    image, other = scan_entry(config).images
    digest = index.infos(scan_entry(config).images).digests[0].tobytes().hex()
    index.save()
    server.files["/a.png"] = replaced
    with pytest.raises(DamagedImageError, match="not the image that an earlier start read any more") as found:
        read_unchanged(image, digest)
    index.mark_damaged({digest: str(found.value)})
    index.save()
    later = ImageIndex(tmp_path / "index.safetensors")
    assert later.knows(other)
    assert not later.knows(image)
    assert (later.info(image).size is not None) == bool(replaced)


def test_a_url_that_changed_is_read_anew_where_no_cache_is_kept(tmp_path: Path, server: Server) -> None:
    server.files |= {"/a.png": png(0), "/b.png": png(5)}
    table = tmp_path / "list.csv"
    table.write_text(f"url,caption\n{server.address}/a.png,a\n{server.address}/b.png,b\n")
    config = DatasetConfig(id="a", type="table", table_file=table, resolution=64)
    folders = DataConfig(cache_dir_vae=tmp_path, cache_dir_text=tmp_path, vae_cache_disable=True)

    def trained() -> set[str]:
        data = TrainingData(
            [config], folders, seed=3, batch_size=1, pixel_alignment=64, index_folder=tmp_path / "index"
        )
        data.set_encoders(vae_identity="vae", text_identity="clip")
        pixels = (lambda images: latents_entries(torch.stack(images)), 1)
        texts = (lambda captions: [text_entry(TextEmbeds(torch.zeros(1, 4, 2))) for _ in captions], 1)
        data.encode_on_demand(OnDemand({VAE: pixels, TEXT_ENCODER: texts}, watch=LoaderWatch()))
        data.leave_out({})
        paths = {sample.path[-5:] for batch in islice(data.batches(), 4) for sample in batch.samples}
        data.flush()
        return paths

    assert trained() == {"a.png", "b.png"}
    server.files["/a.png"] = png(1)
    assert trained() == {"b.png"}
    assert trained() == {"a.png", "b.png"}


def test_expected_urls_are_read_ahead_and_each_once(server: Server, tmp_path: Path) -> None:
    server.files |= {f"/{number}.png": png(number) for number in range(40)}
    rows = "".join(f"{server.address}/{number:02}.png,x\n".replace("/0", "/") for number in range(40))
    (tmp_path / "list.csv").write_text(f"url,text\n{rows}a.png,x\n")
    (tmp_path / "a.png").write_bytes(png(99))
    config = DatasetConfig(
        id="a", type="table", table_file=tmp_path / "list.csv", caption_strategy="filename"
    )
    images = list(scan_entry(config).images)
    expect(images)
    ends_s = time.monotonic() + 10
    while len(server.requests) < storage.MOST_REQUESTS:
        assert time.monotonic() < ends_s, "nothing is read ahead"
        time.sleep(0.01)
    server_images = {image.name: read_bounded(image, limit=10**6) for image in images}
    assert server_images.pop("a.png") == png(99)
    assert server_images == {
        f"{server.address.partition('://')[2]}/{number}.png": png(number) for number in range(40)
    }
    assert len(server.requests) == 40


def test_a_preview_waits_for_urls_as_long_as_for_storage(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.csv").write_text(f"url,caption\n{server.address}/a.png,a\n")
    config = DatasetConfig(
        id="a", type="table", table_file=tmp_path / "list.csv", instance_data_dir=tmp_path, resolution=64
    )
    goes_on = threading.Event()
    monkeypatch.setattr(UrlReader, "read", lambda *_, **__: goes_on.wait(10) and b"")
    monkeypatch.setattr(preview_module, "LONGEST_REMOTE_S", 0.3)
    data = DataConfig(cache_dir_vae=tmp_path / "cache")
    found = preview_module.preview(config, data, alignment=8, seed=0, reads_all=False)
    goes_on.set()
    assert found.unreachable == "it takes longer than 0.3 s."
