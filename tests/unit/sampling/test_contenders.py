"""What is compared: checkpoints of runs, single ones, files; in which order and under which names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.sampling.contenders import (
    Contender,
    find_contenders,
    run_prompts,
    validation_settings,
)


def run_of(folder: Path, *steps: int, finished: int | None = None) -> Path:
    """The folder of a run with these checkpoints."""
    places = [folder / f"checkpoint-{step}" for step in steps]
    for each in [folder, *places]:
        each.mkdir(parents=True, exist_ok=True)
    for each in [*places, *([folder] if finished is not None else [])]:
        (each / ADAPTER_FILE).write_bytes(b"")
    (folder / "config.resolved.json").write_text("{}")
    if finished is not None:
        (folder / "finished.json").write_text(json.dumps({"step": finished}))
    return folder


def titles(found: list[Contender]) -> list[str]:
    return [each.title for each in found]


def test_run_gives_its_checkpoints_oldest_first_and_its_end_once(tmp_path: Path) -> None:
    run = run_of(tmp_path / "猫", 9, 100, 20, finished=100)
    assert titles(find_contenders([run])) == ["猫, step 9", "猫, step 20", "猫, step 100"]
    ends_between = run_of(tmp_path / "other", 1000, finished=1500)
    assert titles(find_contenders([ends_between])) == ["other, step 1,000", "other, step 1,500"]
    assert titles(find_contenders([run], newest=2)) == ["猫, step 20", "猫, step 100"]


def test_run_that_goes_on_gives_what_it_has(tmp_path: Path) -> None:
    assert titles(find_contenders([run_of(tmp_path / "a", 5)])) == ["a, step 5"]
    with pytest.raises(AdapterError, match="no checkpoint yet"):
        find_contenders([run_of(tmp_path / "b")])


def test_checkpoint_and_file_of_a_run_know_their_step_and_count_once(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", 5, 6, finished=6)
    paths = [run / "checkpoint-5", run / "checkpoint-5" / ADAPTER_FILE, run / "checkpoint-6"]
    found = find_contenders(paths)
    assert titles(found) == ["a, step 5", "a, step 6"]
    assert {each.run for each in found} == {run}
    assert titles(find_contenders([run / ADAPTER_FILE])) == ["a, step 6"]


def test_runs_of_one_name_have_their_paths(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / each / "a", 5) for each in ("x", "y")]
    assert titles(find_contenders(runs)) == [f"{run}, step 5" for run in runs]


def test_folder_of_files_gives_each(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    assert titles(find_contenders([tmp_path])) == [f"{tmp_path.name}/a", f"{tmp_path.name}/b"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        find_contenders([tmp_path / "none"])
    with pytest.raises(AdapterError, match=r"no other \.safetensors"):
        find_contenders([tmp_path])


def test_settings_are_those_of_the_run_and_nothing_without_its_files(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", 5)
    config = {"seed": 7, "validation_guidance": 3, "validation_seed": None, "learning_rate": 1}
    (run / "config.resolved.json").write_text(json.dumps(config))
    images = [{"prompt": "a cat"}, {"prompt": "a dog"}, {"prompt": "a cat"}, "torn"]
    (run / "run.json").write_text(json.dumps({"shots": images}))
    assert validation_settings(run) == {"validation_guidance": 3, "validation_seed": 7}
    assert run_prompts(run) == ["a cat", "a dog"]
    for file in ("config.resolved.json", "run.json"):
        (run / file).unlink()
    assert validation_settings(run) == {}
    assert run_prompts(run) == []
