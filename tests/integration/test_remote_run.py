"""Runs whose images are in remote storage, on servers of this machine."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.helpers.data import preview
from simpletuner.helpers.data.sources.base import FoundFile
from simpletuner.helpers.data.sources.remote import RemoteFolder
from simpletuner.helpers.errors import DataError, SourceError
from simpletuner.helpers.io import storage
from simpletuner.helpers.io.faults import at_crash_points
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.plan import plan_lines
from tests.integration.test_resume import Killed, digest_after
from tests.integration.tiny_runs import TinyRun
from tests.storage_servers import BUCKET, KEY, SECRET, Bucket, answering, serving_folder, serving_s3
from tests.unit.data.image_samples import encoded

ADDRESS = ("aws_bucket_name", "aws_data_prefix")
"""Keys that a URL stands for."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with serving_s3() as made:
        yield made


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, str]:
    """A run on a local folder, and the digest of its end."""
    run = TinyRun(tmp_path_factory.mktemp("local"))
    with run.trainer() as trainer:
        trainer.run()
        return run, trainer.state_digest()


def reading(folder: Path, entry: dict[str, Any]) -> TinyRun:
    """A run on the images of another place."""
    run = TinyRun(folder, num_images=0, keys={"data_backend_config": "remote.json"})
    (folder / "remote.json").write_text(json.dumps([{"id": "pictures", **entry}]))
    return run


def in_s3(bucket: Bucket, prefix: str = "pictures") -> dict[str, Any]:
    return {
        "type": "aws",
        "aws_bucket_name": BUCKET,
        "aws_data_prefix": prefix,
        "aws_endpoint_url": bucket.address,
        "aws_region_name": "us-east-1",
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
    }


@pytest.mark.reliability_row(1)
def test_a_run_from_s3_that_is_killed_ends_as_a_local_one_and_writes_no_secret(
    tmp_path: Path,
    bucket: Bucket,
    local: tuple[TinyRun, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, digest = local
    images = plain.folder / "images"
    bucket.put({f"pictures/{file.name}": file.read_bytes() for file in images.iterdir()})
    run = reading(tmp_path, in_s3(bucket))
    passed: list[str] = []

    def die(name: str) -> None:
        passed.append(name)
        if passed.count("folder.before_rename") == 2:
            raise Killed

    expected: list[list[str]] = []
    expect = RemoteFolder.expect

    def noting(source: RemoteFolder, files: Iterable[FoundFile]) -> None:
        own = list(files)
        expected.append([file.name for file in own])
        expect(source, own)

    monkeypatch.setattr(RemoteFolder, "expect", noting)
    bucket.requests.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(Killed), at_crash_points(die):
        run.run()
    assert bucket.reads(".png") == 6, "for the index, and for the latents"
    pictures = [f"image{number}.png" for number in range(3)]
    assert expected == [pictures, [name.replace("png", "txt") for name in pictures], pictures]
    bucket.requests.clear()
    with caplog.at_level(logging.DEBUG), run.trainer() as trainer:
        assert trainer.progress.step == 2
        trainer.run()
        assert trainer.state_digest() == digest
    assert run.log() == plain.log()
    assert bucket.reads(".png") == 0, "everything is known"
    warned = [each.getMessage() for each in caplog.records if "aws_secret_access_key" in each.getMessage()]
    assert len(warned) == 2, "once at each start"
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in warned[0]
    shown = [each.getMessage() for each in caplog.records if each.levelno >= logging.INFO]
    assert not holds_secret("\n".join(shown).encode())
    (run.folder / "remote.json").unlink()
    found = [path for path in run.folder.rglob("*") if path.is_file() and holds_secret(path.read_bytes())]
    assert not found


def holds_secret(data: bytes) -> bool:
    return SECRET.encode() in data or KEY.encode() in data


def test_a_run_from_a_web_server_ends_as_a_local_one(tmp_path: Path, local: tuple[TinyRun, str]) -> None:
    plain, digest = local
    with serving_folder(plain.folder) as web:
        run = reading(tmp_path, {"instance_data_dir": f"{web.address}/images"})
        with run.trainer() as trainer:
            trainer.run()
            assert trainer.state_digest() == digest
    assert run.log() == plain.log()


def test_a_run_from_storage_archives_in_it_and_a_table_is_a_local_one_and_goes_on_exactly(
    tmp_path: Path, bucket: Bucket
) -> None:
    folders = [TinyRun(tmp_path / name).folder / "images" for name in ("stored", "packed", "listed")]
    stored, packed, listed = folders
    for number, file in enumerate(sorted(packed.iterdir())):
        file.rename(packed / f"in-{number}{file.suffix}")
    kinds = [{"id": each.parent.name, "caption_strategy": "filename"} for each in folders]
    local = TinyRun(
        tmp_path / "local",
        keys={
            "data_backend_config": [
                {**kind, "instance_data_dir": str(folder)}
                for kind, folder in zip(kinds, folders, strict=True)
            ]
        },
    )
    expected = digest_after(local, 5)

    bucket.put({f"stored/{file.name}": file.read_bytes() for file in stored.iterdir()})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as opened:
        for file in sorted(packed.iterdir()):
            opened.add(file, arcname=file.name)
    bucket.put({"shards/train-0.tar": archive.getvalue()})
    table = listed.parent / "list.csv"
    table.write_text("\n".join(["path", *(each.name for each in sorted(listed.glob("*.png")))]))
    keys = {key: value for key, value in in_s3(bucket).items() if key not in ("type", *ADDRESS)}
    places: list[dict[str, Any]] = [
        in_s3(bucket, "stored"),
        {"type": "webdataset", "instance_data_dir": f"s3://{BUCKET}/shards/train-{{0..0}}.tar", **keys},
        {"type": "csv", "table_file": str(table), "instance_data_dir": str(listed)},
    ]
    run = TinyRun(
        tmp_path / "run",
        keys={"data_backend_config": [kind | place for kind, place in zip(kinds, places, strict=True)]},
    )
    digest_after(run, 2)
    bucket.requests.clear()
    assert digest_after(run, 5) == expected
    assert run.log() == local.log()
    assert bucket.reads() == 0, "a second start reads neither images nor archives"


def lines_of(run: TinyRun) -> list[str]:
    config = run.config()
    return list(plan_lines(config, registry.specs()["sdxl"]))


def test_validate_looks_at_images_in_storage(
    tmp_path: Path, bucket: Bucket, local: tuple[TinyRun, str]
) -> None:
    images = local[0].folder / "images"
    bucket.put({f"looked/{file.name}": file.read_bytes() for file in images.iterdir()})
    lines = lines_of(reading(tmp_path, in_s3(bucket, "looked")))
    text = "\n".join(lines)
    assert f"pictures: 3 images in s3://{BUCKET}/looked" in text
    assert "textfile" in text
    assert "picture number 0" in text
    assert not holds_secret(text.encode())


def test_validate_without_a_network_says_that_the_images_were_not_looked_at(tmp_path: Path) -> None:
    run = reading(tmp_path, {"instance_data_dir": "http://127.0.0.1:9/photos"})
    text = "\n".join(lines_of(run))
    assert "pictures: not looked at in http://127.0.0.1:9/photos" in text
    assert (
        "warning     dataset pictures was not looked at: http://127.0.0.1:9/photos: it cannot be read" in text
    )
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:9/photos: it cannot be read in 4 tries"):
        run.run()


def test_validate_waits_for_a_slow_server_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "LONGEST_REMOTE_S", 0.3)
    with answering(lambda _: time.sleep(2)) as web:
        run = reading(tmp_path, {"instance_data_dir": web.address})
        started_s = time.monotonic()
        text = "\n".join(lines_of(run))
        assert time.monotonic() - started_s < 2
    assert "dataset pictures was not looked at: it takes longer than 0.3 s." in text


def test_masks_are_read_from_storage(tmp_path: Path, bucket: Bucket, local: tuple[TinyRun, str]) -> None:
    run = reading(tmp_path, {"instance_data_dir": str(local[0].folder / "images")})
    mask = encoded(Image.new("L", (64, 64), 255), "PNG")
    bucket.put({f"masks/image{number}.png": mask for number in range(3)})
    masks = {"id": "masks", "conditioning_type": "mask", **in_s3(bucket, "masks")}
    images = {
        "id": "pictures",
        "instance_data_dir": str(local[0].folder / "images"),
        "conditioning_data": "masks",
    }
    (tmp_path / "remote.json").write_text(json.dumps([images, masks]))
    assert run.run(max_train_steps=1) == 0


def test_a_folder_in_storage_without_images_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    run = reading(tmp_path, in_s3(bucket, "nothing-here"))
    with pytest.raises(DataError, match=rf"s3://{BUCKET}/nothing-here holds no image"):
        lines_of(run)
    with pytest.raises(DataError, match=rf"no image in s3://{BUCKET}/nothing-here can be used"):
        run.run()
