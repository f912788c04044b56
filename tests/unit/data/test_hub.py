"""Hugging Face datasets: on this machine, and of a hub on loopback that the ordinary client asks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import datasets
import pytest

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.captions import caption_reader
from simpletuner.helpers.data.index import ImageIndex
from simpletuner.helpers.data.sources.base import Scan
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError
from tests.tables import embedded, png, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROBE = """
import json, sys
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.captions import caption_reader
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import SimpleTunerError

for keys in json.loads(sys.argv[1]):
    config = DatasetConfig(id="a", type="huggingface", **keys)
    try:
        scan = scan_entry(config)
        reader = caption_reader(config, scan)
        for each in scan.images:
            size = len(each.source.read(each, limit=10**6))
            print(each.name, each.signature, size, *reader.read(each).texts)
    except SimpleTunerError as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset(folder: Path, **keys: Any) -> DatasetConfig:
    return DatasetConfig(id="a", type="huggingface", dataset_name=str(folder), **keys)


def rows(config: DatasetConfig, scan: Scan | None = None) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Name -> bytes and captions of each image."""
    reader = caption_reader(config, scan or scan_entry(config))
    return {
        image.name: (image.source.read(image, limit=10**6), reader.read(image).texts)
        for image in reader.scan.images
    }


def parquet_folder(folder: Path) -> Path:
    """A dataset with two files of its split train, and one of its split test."""
    (folder / "data").mkdir(parents=True)
    for name, numbers in (
        ("train-00000-of-00002", (0, 1)),
        ("train-00001-of-00002", (2,)),
        ("test-00000-of-00001", (3,)),
    ):
        table = embedded([png(number) for number in numbers], text=[f"row {number}" for number in numbers])
        write(table, folder / "data" / f"{name}.parquet")
    return folder


def test_the_rows_of_a_split_are_images_with_their_bytes_as_they_are(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "set")
    assert rows(dataset(folder)) == {f"train/00000{n}": (png(n), (f"row {n}",)) for n in range(3)}
    assert rows(dataset(folder, split="test")) == {"test/000000": (png(3), ("row 3",))}
    assert list(rows(dataset(folder, row_filter={"text": ["row 2"]}))) == ["train/000002"]
    assert scan_entry(dataset(folder)).images[1].place == f"{folder} (train), row 1"


def test_a_dataset_that_was_saved_to_disk_is_read_where_it_lies(tmp_path: Path) -> None:
    both = datasets.load_dataset(str(parquet_folder(tmp_path / "set")))
    both.save_to_disk(tmp_path / "both")
    both["test"].save_to_disk(tmp_path / "one")
    assert list(rows(dataset(tmp_path / "both"))) == [f"train/00000{number}" for number in range(3)]
    assert rows(dataset(tmp_path / "one")) == {"train/000000": (png(3), ("row 3",))}
    with pytest.raises(DataError, match=r'Unknown split "x"\. Should be one of .*Correct split'):
        scan_entry(dataset(tmp_path / "both", split="x"))


@pytest.mark.reliability_row(17)
def test_an_image_outside_the_rows_is_read_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.index._RACY_NS", -1)
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")

    def digests() -> list[str]:
        index = ImageIndex(tmp_path / "index.json")
        found = [index.info(image).digest for image in scan_entry(dataset(folder)).images]
        index.save()
        return found

    first = digests()
    state = (folder / "1.png").stat()
    (folder / "1.png").write_bytes(png(2))
    os.utime(folder / "1.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digests()[0] == first[0]
    assert digests()[1] != first[1]
    (folder / "1.png").unlink()
    image = scan_entry(dataset(folder)).images[1]
    assert "No such file" in str(ImageIndex(tmp_path / "other.json").info(image).problem)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "x"}, r'Unknown split "x"\. Should be one of .*train.*Correct split'),
        ({"image_column": "img"}, "image_column 'img' is no column. .*columns are: image, text"),
        (
            {"caption_column": "caption"},
            "caption_column 'caption' is no column. Its columns are: image, text",
        ),
    ],
    ids=["split", "image", "caption"],
)
def test_what_a_dataset_lacks_is_named(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan_entry(dataset(parquet_folder(tmp_path / "set"), **keys))


@pytest.mark.parametrize("data", [None, b"PAR1 but no more"], ids=["empty", "damaged"])
def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path, data: bytes | None) -> None:
    (tmp_path / "set").mkdir()
    if data is not None:
        (tmp_path / "set" / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"dataset_name .*set: it cannot be loaded: "):
        scan_entry(dataset(tmp_path / "set"))


class Hub(ThreadingHTTPServer):
    """Serves a folder as the dataset owner/set; knows nothing else."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        data = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def answer(self, path: str, body: str) -> tuple[int, dict[str, str], bytes]:
        prefix, files = "/api/datasets/owner/set", "/datasets/owner/set/resolve/"
        if path.startswith(files):
            file = self.folder / path.removeprefix(files).partition("/")[2]
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            etag = f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"'
            return 200, {"X-Repo-Commit": COMMIT, "ETag": etag}, file.read_bytes()
        if path in (prefix, f"{prefix}/revision/main", f"{prefix}/revision/{COMMIT}"):
            answer: object = {"id": "owner/set", "sha": COMMIT, "private": False, "siblings": [], "tags": []}
        elif path.startswith(f"{prefix}/tree/"):
            folder = self.folder / path.removeprefix(f"{prefix}/tree/").partition("/")[2]
            answer = [self.entry(each) for each in sorted(folder.iterdir())] if folder.is_dir() else []
        elif path.startswith(f"{prefix}/paths-info/"):
            wanted = [self.folder / each for each in parse_qs(body).get("paths", [])]
            answer = [self.entry(each) for each in wanted if each.exists()]
        else:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        assert len(self.server.requests) < 300, "the client does not end"
        status, headers, data = self.server.answer(path, body.decode())
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(parquet_folder(tmp_path / "set"))
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(10)


def ask(address: str, home: Path, *entries: dict[str, object], offline: bool = False) -> list[str]:
    """What a fresh process says of these entries."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", PROBE, json.dumps(entries)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.reliability_row(25)
def test_a_dataset_of_the_hub_and_the_rows_of_a_stream_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    whole: dict[str, object] = {"dataset_name": "owner/set"}
    stream = whole | {"streaming": True, "max_num_samples": 2}
    unknown: dict[str, object] = {"dataset_name": "owner/none"}
    *first, none, split = ask(hub.address, tmp_path / "home", stream, whole, unknown, whole | {"split": "x"})
    assert [line.split()[0] for line in first] == [f"train/00000{number}" for number in (0, 1, 0, 1, 2)]
    assert [line[-5:] for line in first] == [f"row {number}" for number in (0, 1, 0, 1, 2)]
    assert none.startswith("DataError: dataset_name owner/none: ")
    assert "hf auth login or set HF_TOKEN" in none
    assert "Unknown split" in split
    write(embedded([png(9)] * 2, text=["new", "new"]), hub.folder / "data" / "train-00000-of-00002.parquet")
    number = len(hub.requests)
    *again, missing = ask(hub.address, tmp_path / "home", stream, whole, unknown, offline=True)
    assert again == first
    assert missing.startswith("UnreachableError: dataset_name owner/none: it is not in the hub's cache")
    assert "HF_HUB_OFFLINE is set" in missing
    assert len(hub.requests) == number


@pytest.mark.reliability_row(17)
def test_a_changed_dataset_is_noticed_if_it_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9)
    signatures = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / f"{number}"
        datasets.Dataset(embedded([png(seed)], text=["a"])).save_to_disk(str(folder))
        signatures.append(scan_entry(dataset(folder)).images[0].signature)
    assert signatures[0] == signatures[1] != signatures[2]
