"""Names in an output folder: what is formatted can be parsed, and other names are passed over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.helpers.contracts import Size
from simpletuner.helpers.io import run_folder


def test_checkpoint_folders_are_those_with_a_number_oldest_step_first(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-3.bak", "step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    steps = [(step, run_folder.checkpoint_folder(tmp_path, step)) for step in (9, 10)]
    assert run_folder.checkpoint_folders(tmp_path) == steps


def test_validation_step_folders_are_found_by_their_step(tmp_path: Path) -> None:
    folders = [run_folder.validation_step_folder(tmp_path, step) for step in (0, 20, 100)]
    for folder in folders:
        folder.mkdir()
    assert run_folder.validation_step_folders(tmp_path) == list(zip((0, 20, 100), folders, strict=True))


@pytest.mark.parametrize(("index", "seed"), [(3, 7), (3, -1), (103, 7)])
def test_image_name_is_parsed_into_what_it_was_formatted_from(index: int, seed: int) -> None:
    name = run_folder.image_name(index, "a red cat", size=Size(64, 96), seed=seed)
    assert name == f"{index:02d}-a_red_cat-96x64-seed{seed}"
    parsed = run_folder.parse_image_name(name)
    assert parsed == {"prompt": "a red cat", "size": "96x64", "seed": str(seed)}
    assert run_folder.parse_image_name("grid") == {}


def test_image_files_leave_the_grid_out(tmp_path: Path) -> None:
    for name in ("00-a", "01-b"):
        run_folder.image_file(tmp_path, name).touch()
    (tmp_path / run_folder.GRID_FILE).touch()
    assert run_folder.image_files(tmp_path) == {name: tmp_path / f"{name}.png" for name in ("00-a", "01-b")}


def test_cached_image_files_hold_the_newest_of_each_name(tmp_path: Path) -> None:
    files = [
        run_folder.cached_image_file(tmp_path, name, digest=digit * 16)
        for name, digit in (("00-a", "1"), ("00-a", "0"), ("01-b", "2"))
    ]
    files[0].parent.mkdir()
    for age_s, file in enumerate(reversed(files)):
        file.touch()
        os.utime(file, (1000 - age_s, 1000 - age_s))
    (files[0].parent / "other.png").touch()
    assert run_folder.cached_image_files(tmp_path) == {"00-a": files[1], "01-b": files[2]}
