"""Images in remote storage, read from servers on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.index import ImageIndex, content_digest, read_unchanged
from simpletuner.helpers.data.sources import read_ahead, remote
from simpletuner.helpers.data.sources.base import FoundFile, Scan, expect, read_bounded
from simpletuner.helpers.data.sources.opening import scan_entry
from simpletuner.helpers.errors import DataError, MissingDependencyError, SourceError, UnreachableError
from simpletuner.helpers.io import storage
from tests.storage_servers import (
    BUCKET,
    KEY,
    SECRET,
    Bucket,
    answering,
    send,
    serving_folder,
    serving_s3,
    serving_sftp,
)
from tests.unit.data.image_samples import encoded
from tests.unit.data.test_tar import packed


def png(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height)), "PNG")


LIMIT = 1 << 20
FILES = {"a.png": png(8, 8), "a.txt": b"a cat", "sub/b.png": png(9, 8), "notes.md": b"x"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the machine; short pauses and waits."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def _server() -> Iterator[Bucket]:
    with serving_s3() as bucket:
        yield bucket


@pytest.fixture
def bucket(_server: Bucket) -> Bucket:
    _server.clear()
    return _server


def entry(url: str, **keys: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"id": "photos", "instance_data_dir": url} | keys)


def in_s3(bucket: Bucket, folder: str = "/cats", **keys: object) -> DatasetConfig:
    own = {"aws_endpoint_url": bucket.address, "aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
    return entry(f"s3://{BUCKET}{folder}", aws_region_name="us-east-1", **own | keys)


def names(scan: Scan) -> list[str]:
    return [file.name for file in scan.images]


def contents(scan: Scan) -> dict[str, bytes]:
    return contents_of(scan.images)


def assert_reads_files(scan: Scan) -> None:
    assert contents(scan) == {name: FILES[name] for name in ("a.png", "sub/b.png")}
    assert read_bounded(scan.captions["a"][0], limit=LIMIT) == b"a cat"
    assert scan.others == ("notes.md",)


def test_a_bucket_is_listed_once_and_read_by_key(bucket: Bucket) -> None:
    bucket.put({f"cats/{name}": body for name, body in FILES.items()} | {"cats-2/c.png": b"x"})
    bucket.requests.clear()
    scan = scan_entry(in_s3(bucket, "/cats/"))
    assert [method for method, _ in bucket.requests] == ["GET"], "the listing, and nothing for each object"
    assert_reads_files(scan)
    assert bucket.reads() == 3
    assert scan.images[0].place == f"s3://{BUCKET}/cats/a.png"


def test_a_whole_bucket_is_a_folder_too(bucket: Bucket) -> None:
    bucket.put(FILES)
    assert_reads_files(scan_entry(in_s3(bucket, "")))


def test_credentials_and_address_come_from_the_environment(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(FILES)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": bucket.address,
    }.items():
        monkeypatch.setenv(name, value)
    assert_reads_files(scan_entry(entry(f"s3://{BUCKET}")))


def test_a_web_server_is_read_through_its_index_pages(tmp_path: Path) -> None:
    folder = written(tmp_path / "served", FILES | {"sub/.hidden/c.png": b"x", ".d.png": b"x"})
    with serving_folder(tmp_path) as web:
        scan = scan_entry(entry(f"{web.address}/{folder.name}"))
        assert_reads_files(scan)
        assert not [path for method, path in web.requests if method == "HEAD" and "notes" in path]


def test_an_sftp_server_is_read_with_the_keys_that_ssh_knows(tmp_path: Path) -> None:
    written(tmp_path / "photos", FILES | {".hidden/c.png": b"x"})
    (tmp_path / "photos" / "out.png").symlink_to(tmp_path)
    with serving_sftp(tmp_path, tmp_path / "home") as host:
        scan = scan_entry(entry(f"sftp://me:{SECRET}@{host}/photos"))
        assert_reads_files(scan)
        assert scan.images[0].place == f"sftp://***@{host}/photos/a.png"
        with pytest.raises(SourceError, match=r"access is denied .*`sftp` with the same server") as caught:
            scan_entry(entry(f"sftp://me:wrong-password@{host}/photos"))
        assert "wrong-password" not in str(caught.value)
        (tmp_path / "home" / ".ssh" / "known_hosts").unlink()
        with pytest.raises(SourceError, match=r"access is denied .*known_hosts"):
            scan_entry(entry(f"sftp://me:{SECRET}@{host}/photos"))


def test_an_sftp_server_that_started_again_is_connected_again(tmp_path: Path) -> None:
    written(tmp_path / "photos", FILES)
    with serving_sftp(tmp_path, tmp_path / "home") as host:
        scan = scan_entry(entry(f"sftp://me:{SECRET}@{host}/photos"))
        source = scan.images[0].source
        assert isinstance(source, remote.RemoteFolder)
        source._storage._fs.client.abort()
        assert_reads_files(scan)


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


@pytest.mark.reliability_row(20)
@pytest.mark.reliability_row(16)
def test_any_key_is_read_under_its_name(bucket: Bucket) -> None:
    keys = ["🐈.png", "a\u0301.png", "\u202eright.png", "-dash.png", "a b+c%20&#.png", "A.png", "a.png"]
    bucket.put({f"cats/{key}": key.encode() for key in keys})
    assert contents(scan_entry(in_s3(bucket))) == {key: key.encode() for key in keys}


@pytest.mark.reliability_row(20)
def test_any_name_on_a_web_server_is_read(tmp_path: Path) -> None:
    keys = ["🐈.png", "-dash.png", "a b+c%20&#?.png", "'x\".png", "A.png", "a.png"]
    written(tmp_path, {key: key.encode() for key in keys})
    with serving_folder(tmp_path) as web:
        assert contents(scan_entry(entry(web.address))) == {key: key.encode() for key in keys}


@pytest.mark.reliability_row(21)
def test_of_the_links_on_a_page_those_to_files_below_it_are_read() -> None:
    links = (
        *("a&amp;b.png", "/photos/c.png", "./", "../", "?C=N;O=D", "#top", "/elsewhere/d.png"),
        *("https://example.com/e.png", "mailto:f.png@example.com", "..%2fg.png"),
    )
    page = "".join(f'<a href="{link}">x</a>' for link in links).encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        is_page = request.path.endswith("/")
        send(request, 200, page if is_page else request.path.encode(), ETag="1", Content_Type="text/html")

    with answering(answer) as web:
        scan = scan_entry(entry(f"{web.address}/photos"))
        assert contents(scan)["a&b.png"] == b"/photos/a&b.png"
        assert set(names(scan)) == {"a&b.png", "c.png"}
        assert dict(scan.skipped).keys() == {"../g.png"}
    assert not [path for _, path in web.requests if "elsewhere" in path]


@pytest.mark.reliability_row(21)
def test_keys_that_are_no_paths_are_skipped_and_folders_and_hidden_objects_are_none(bucket: Bucket) -> None:
    wrong = ["../up.png", "a/../b.png", "/root.png", "a//b.png", "./here.png"]
    others = ["", "empty/", ".hidden.png", ".thumbnails/a.png"]
    bucket.put({f"cats/{key}": b"x" for key in wrong} | {f"cats/{key}": b"" for key in others})
    bucket.put({"cats/good.png": b"x"})
    scan = scan_entry(in_s3(bucket))
    assert names(scan) == ["good.png"]
    assert dict(scan.skipped).keys() == set(wrong)
    assert {"its key is no plain path: a part of it is empty, . or .."} == set(dict(scan.skipped).values())


@pytest.mark.reliability_row(13)
def test_an_empty_object_and_a_damaged_one_are_skipped_with_their_reasons(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put({"cats/empty.png": b"", "cats/page.png": b"<html>", "cats/good.png": png(8, 8)})
    index = ImageIndex(tmp_path / "index.json")
    found = {file.name: index.info(file).problem for file in scan_entry(in_s3(bucket)).images}
    assert found.pop("good.png") is None
    assert all(found.values())


def test_the_second_start_reads_the_listing_alone(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put({f"cats/{number}.png": png(8, 8 + number) for number in range(4)})
    for expected in (4, 0, 1):
        bucket.requests.clear()
        index = ImageIndex(tmp_path / "index.json")
        images = scan_entry(in_s3(bucket)).images
        index.expect(images)
        assert [index.info(file).problem for file in images] == [None] * 4
        index.save()
        assert bucket.reads() == expected
        bucket.put({"cats/3.png": png(9, 9 + expected)} if expected == 0 else {})


@pytest.mark.reliability_row(17)
def test_an_object_replaced_by_another_of_its_size_is_another(bucket: Bucket) -> None:
    signatures = []
    for body in (b"one", b"two"):
        bucket.put({"cats/a.png": body})
        (image,) = scan_entry(in_s3(bucket)).images
        signatures.append(image.signature)
        assert image.source.changed_ns(image) == 0
    assert signatures[0] != signatures[1]
    assert signatures[0][:2] == (3, "version")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"ETag": '"v1"'}, ("version", '"v1"')),
        ({"Last_Modified": "Tue, 01 Dec 2026 04:00:00 GMT"}, ("time", 1796097600 * 10**9)),
        ({}, ("unknown",)),
    ],
    ids=["version", "time", "neither"],
)
def test_a_file_of_a_web_server_is_known_again_by_its_version_or_time(
    headers: dict[str, str], expected: tuple[object, ...]
) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith("/"):
            send(request, 200, b'<a href="a.png">a</a>', Content_Type="text/html")
        else:
            send(request, 200, b"bytes", **headers)

    with answering(answer) as web:
        first, second = (scan_entry(entry(web.address)).images[0] for _ in range(2))
    assert first.signature[: 1 + len(expected)] == (5, *expected)
    assert (first.signature == second.signature) == (expected[0] != "unknown")
    assert first.source.changed_ns(first) == (expected[1] if expected[0] == "time" else 0)


def test_expected_files_are_read_many_at_a_time_and_each_once(bucket: Bucket) -> None:
    bucket.put({f"cats/{number:03}.png": bytes([number]) for number in range(40)})
    images = scan_entry(in_s3(bucket)).images
    bucket.requests.clear()
    expect(images)
    until(lambda: bucket.reads() >= storage.MOST_REQUESTS)
    time.sleep(0.1)
    assert bucket.reads() == storage.MOST_REQUESTS, "no more than the window"
    assert [read_bounded(file, limit=LIMIT) for file in images] == [bytes([number]) for number in range(40)]
    assert bucket.reads() == 40


def test_files_ahead_fit_into_memory(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MOST_BYTES_AHEAD", 2500)
    bucket.put({f"cats/{number}.png": bytes(1000) for number in range(6)})
    images = scan_entry(in_s3(bucket)).images
    bucket.requests.clear()
    expect(images)
    until(lambda: bucket.reads() >= 2)
    time.sleep(0.1)
    assert bucket.reads() == 2
    assert [len(read_bounded(file, limit=LIMIT)) for file in reversed(images)] == [1000] * 6
    time.sleep(0.2)
    assert bucket.reads() == 6, "read in another order, each once"


def until(is_so: object) -> None:
    ends_s = time.monotonic() + 10
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < ends_s, "it takes too long"
        time.sleep(0.01)


def test_a_larger_file_is_refused_before_it_is_read(bucket: Bucket) -> None:
    bucket.put({"cats/a.png": bytes(11)})
    (image,) = scan_entry(in_s3(bucket)).images
    bucket.requests.clear()
    with pytest.raises(DataError, match="it is over 10 bytes"):
        read_bounded(image, limit=10)
    assert not bucket.requests


def test_a_web_server_that_states_no_size_is_read_up_to_the_limit() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith("/"):
            send(request, 200, b'<a href="a.png">a</a>', Content_Type="text/html")
            return
        request.send_response(200)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(bytes(1000))

    with answering(answer) as web:
        (image,) = scan_entry(entry(web.address)).images
        assert image.signature[0] == -1
        assert read_bounded(image, limit=1000) == bytes(1000)
        with pytest.raises(DataError, match="it is over 999 bytes"):
            read_bounded(image, limit=999)


def test_an_object_that_is_gone_is_skipped_and_one_that_changed_ends_the_start(bucket: Bucket) -> None:
    bucket.put({"cats/a.png": b"one", "cats/b.png": b"two", "cats/c.png": b"six"})
    gone, longer, same = scan_entry(in_s3(bucket)).images
    bucket.client.delete_object(Bucket=BUCKET, Key="cats/a.png")
    bucket.put({"cats/b.png": b"three", "cats/c.png": b"ten"})
    with pytest.raises(DataError, match=r"^there is no such file any more$"):
        read_bounded(gone, limit=LIMIT)
    with pytest.raises(SourceError, match=r"s3://photos/cats/b.png: .*more bytes arrived of 3"):
        read_bounded(longer, limit=LIMIT)
    with pytest.raises(DataError, match=r"s3://photos/cats/c.png: it changed after the scan"):
        read_unchanged(same, content_digest(b"six"))


@pytest.mark.parametrize("fault", ["torn", "error", "slow"])
def test_a_read_that_fails_is_tried_again(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LONGEST_READ_S", 0.3)
    failures = [3]

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith("/"):
            send(request, 200, b'<a href="a.png">a</a>', Content_Type="text/html")
        elif request.command == "HEAD" or failures[0] <= 0:
            send(request, 200, b"0123456789", ETag="1")
        else:
            failures[0] -= 1
            if fault == "torn":
                send(request, 200, b"01234", Content_Length="10")
                request.close_connection = True
            elif fault == "error":
                send(request, 503)
            else:
                time.sleep(0.5)

    with answering(answer) as web:
        (image,) = scan_entry(entry(web.address)).images
        assert read_bounded(image, limit=LIMIT) == b"0123456789"
        failures[0] = 4
        with pytest.raises(UnreachableError, match=rf"{web.address}/a.png: it cannot be read in 4 tries"):
            read_bounded(image, limit=LIMIT)
        assert failures == [0]


def refusing(status: int, code: str) -> object:
    body = f"<Error><Code>{code}</Code><Message>{code} {KEY}</Message></Error>".encode()
    return answering(lambda request: send(request, status, body, Content_Type="application/xml"))


@pytest.mark.parametrize(
    ("status", "code", "pattern"),
    [
        (403, "InvalidAccessKeyId", r"access is denied \(.*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", r"access is denied \(.*AWS_ACCESS_KEY_ID"),
        (403, "ExpiredToken", r"access is denied \(.*AWS_ACCESS_KEY_ID"),
        (404, "NoSuchBucket", r"there is no such bucket or folder. Check instance_data_dir"),
        (503, "SlowDown", r"cannot be read in 4 tries"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) and value.isalnum() else "",
)
def test_a_bucket_that_cannot_be_listed_is_one_error_without_secrets(
    status: int, code: str, pattern: str
) -> None:
    with refusing(status, code) as web, pytest.raises(SourceError, match=pattern) as caught:  # type: ignore[attr-defined]
        scan_entry(in_s3(Bucket(web.address, None)))
    assert str(caught.value).startswith(f"s3://{BUCKET}/cats: ")
    assert SECRET not in str(caught.value)


def test_missing_credentials_are_named(bucket: Bucket) -> None:
    without = in_s3(bucket, aws_access_key_id=None, aws_secret_access_key=None)
    with pytest.raises(SourceError, match=r"access is denied .*AWS_ACCESS_KEY_ID"):
        scan_entry(without)


@pytest.mark.parametrize("scheme", ["s3", "http", "sftp"])
def test_a_server_that_is_not_there_is_unreachable(scheme: str) -> None:
    url = f"s3://{BUCKET}" if scheme == "s3" else f"{scheme}://127.0.0.1:9/photos"
    keys = {"aws_endpoint_url": "http://127.0.0.1:9", "aws_access_key_id": KEY}
    own = keys | {"aws_secret_access_key": SECRET} if scheme == "s3" else {}
    with pytest.raises(UnreachableError, match=r"^\S+: it cannot be read in 4 tries: .*Check the network"):
        scan_entry(entry(url, **own))


def test_a_web_page_without_links_and_a_missing_one_are_errors(tmp_path: Path) -> None:
    with serving_folder(tmp_path) as web:
        with pytest.raises(SourceError, match=r"there is no such bucket or folder"):
            scan_entry(entry(f"{web.address}/nowhere"))
        with pytest.raises(SourceError, match=r"links to no file in it"):
            scan_entry(entry(f"{web.address}/home"))


def test_a_missing_package_is_an_error_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "simpletuner-t\[s3\]"'):
        scan_entry(entry("s3://bucket"))


def test_unreachable_storage_in_the_scan_ends_it_and_is_no_skipped_image(tmp_path: Path) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith("/"):
            send(request, 200, b'<a href="a.png">a</a>', Content_Type="text/html")
        else:
            send(request, 200 if request.command == "HEAD" else 500, b"x", ETag="1")

    with answering(answer) as web:
        (image,) = scan_entry(entry(web.address)).images
        with pytest.raises(SourceError):
            ImageIndex(tmp_path / "index.json").info(image)


def test_what_a_source_reads_ahead_is_asked_of_remote_ones_alone(tmp_path: Path) -> None:
    written(tmp_path / "local", FILES)
    images = scan_entry(entry(str(tmp_path / "local"))).images
    assert isinstance(images[0], FoundFile)
    expect(images)
    assert not images[0].source.reads_ahead


def test_members_of_archives_in_storage_are_read_ahead_by_range(bucket: Bucket) -> None:
    files = {f"{number:03}.png": bytes([number]) * 100 for number in range(40)}
    bucket.put({"cats/0.tar": packed(files)})
    images = scan_entry(in_s3(bucket, type="webdataset")).images
    bucket.requests.clear()
    expect(images)
    until(lambda: bucket.reads() >= storage.MOST_REQUESTS)
    assert contents_of(images) == files
    assert bucket.reads() == 40


def test_the_cells_of_a_table_may_name_objects(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put({"cats/a.png": png(8, 8), "b c.png": png(8, 16)})
    cells = [f"s3://{BUCKET}/{name}" for name in ("cats/a.png", "b c.png", "gone.png", "")]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["image,caption", *(f"{cell},x" for cell in cells)]))
    config = in_s3(bucket, instance_data_dir=None, type="table", table_file=table)
    scan = scan_entry(config)
    assert scan.skipped == (("line 5", f"its URL s3://{BUCKET}/ names a bucket or server, not a file"),)
    *found, gone = scan.images
    assert contents_of(found) == {f"{BUCKET}/cats/a.png": png(8, 8), f"{BUCKET}/b c.png": png(8, 16)}
    with pytest.raises(DataError, match="there is no such file any more"):
        read_bounded(gone, limit=LIMIT)


def contents_of(images: Iterable[FoundFile]) -> dict[str, bytes]:
    return {file.name: read_bounded(file, limit=LIMIT) for file in images}
