"""Runs on images that are rows: what they train, and that they go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.helpers.io.run_folder import RUN_MANIFEST_FILE
from tests.integration.test_resume import digest_after
from tests.integration.tiny_runs import TinyRun
from tests.tables import embedded, png, write


def parquet_run(folder: Path, **entry: object) -> TinyRun:
    """A run on a parquet file with three images, of which the second is cut off, and their captions."""
    folder.mkdir(parents=True)
    images = [png(0), png(1)[:9000], png(2), png(3)]
    captions = [["picture number 0", "the first one"], ["damaged"], ["picture number 2"], None]
    file = write(embedded(images, text=captions), folder / "train.parquet", group=2)
    return TinyRun(folder, num_images=0, entry={"type": "parquet", "table_file": str(file)} | entry)


@pytest.mark.reliability_row(4)
@pytest.mark.reliability_row(13)
def test_a_run_on_a_parquet_file_with_images_goes_on_exactly_where_it_stopped(tmp_path: Path) -> None:
    whole = parquet_run(tmp_path / "whole")
    digest = digest_after(whole, 5)
    page = json.loads((whole.output_dir / RUN_MANIFEST_FILE).read_text())["datasets"][0]
    assert [path for path, _ in page["skipped"]] == ["000001"]
    assert {caption for _, caption in page["captions"]} == {"picture number 0", "picture number 2"}
    stopped = parquet_run(tmp_path / "stopped")
    digest_after(stopped, 2)
    assert digest_after(stopped, 5) == digest
    assert stopped.log() == whole.log()


def test_a_table_of_paths_trains_what_its_folder_trains(tmp_path: Path) -> None:
    folder = TinyRun(tmp_path / "folder", keys={"caption_dropout_probability": 0})
    table = TinyRun(tmp_path / "table", keys={"caption_dropout_probability": 0})
    lines = [f"images/image{number}.png,picture number {number}" for number in range(3)]
    file = table.folder / "list.csv"
    file.write_text("\n".join(["file,words", *lines]))
    base = {"instance_data_dir": str(table.folder / "images")}
    columns = {"csv_url_column": "file", "csv_caption_column": "words", "caption_strategy": "csv"}
    file.write_text(file.read_text().replace("images/", ""))
    table.entry = {"type": "csv", "csv_file": str(file)} | base | columns
    assert digest_after(table, 3) == digest_after(folder, 3)
