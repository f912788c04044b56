"""A run whose texts hold values of environment variables shows and writes their placeholders only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.helpers.caching.shards import read_index
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    CHANGES_FILE,
    COMPATIBILITY_FILE,
    CONFIG_FILE,
    PAGE_FILE,
    RUN_MANIFEST_FILE,
    SUMMARY_FILE,
    TENSORBOARD_FOLDER,
)
from simpletuner.helpers.io.safetensors_file import open_safetensors
from tests.integration import processes
from tests.integration.processes import Running
from tests.integration.tiny_runs import TLORA, TinyRun, tiny_model

pytestmark = pytest.mark.xdist_group("processes")

# Its first and its last word tell whether it is somewhere, whatever happens to the characters between.
SECRET = "s3cret ä'&\"v4lue"
OTHER = "an0ther v4lue"
NAMED = "{env:TOY_SECRET}"


def command(folder: Path, *arguments: str, secret: str = SECRET) -> Running:
    return processes.start(folder / "command.py", *arguments, environment={"TOY_SECRET": secret}, cwd=folder)


def write_files(folder: Path) -> None:
    """Texts and paths with the value, in each of the user's files."""
    run = TinyRun(folder)
    for each in (folder / "images").glob("*.txt"):
        each.unlink()
    for secret in (SECRET, OTHER):
        (folder / f"model {secret}").symlink_to(tiny_model())
        (folder / f"images {secret}").mkdir()
        Image.new("RGB", (64, 64), "red").save(folder / f"images {secret}" / "image.png")
    run.config()
    keys = json.loads((folder / "config.json").read_text()) | {
        "pretrained_model_name_or_path": f"model {NAMED}",
        "output_dir": f"output {NAMED}/run",
        "cache_dir_text": "cache/text",
        "cache_dir_vae": f"cache/vae {NAMED}",
        "max_train_steps": 2,
        "checkpoint_step_interval": 1,
        "report_to": "tensorboard",
        "tracker_run_name": f"{NAMED} run",
        "tracker_project_name": f"{NAMED} project",
        "validation_disable": False,
        "validation_prompt": f"a {NAMED} cat",
        "validation_negative_prompt": f"no {NAMED}",
        "validation_num_inference_steps": 1,
        "user_prompt_library": "prompts.json",
    }
    (folder / "config.json").write_text(json.dumps(keys))
    preset = {"target_module": ["Attention"], "exclude_name": [f".*to_out.*|{NAMED}"]}
    dataset = {"id": "pictures", "instance_data_dir": f"images {NAMED}", "instance_prompt": f"{NAMED} toy"}
    (folder / "lycoris.json").write_text(json.dumps({**TLORA, "apply_preset": preset, "multiplier": 1}))
    (folder / "data.json").write_text(json.dumps([dataset]))
    (folder / "command.py").write_text("from simpletuner import cli\ncli.main()\n")
    (folder / "prompts.json").write_text(json.dumps({"mine": f"{NAMED} in the snow"}))


def holding_a_value(*folders: Path) -> list[str]:
    """Files with a value of the variable in their bytes."""
    words = [word.encode() for word in ("s3cret", "v4lue", "an0ther")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if any(word in file.read_bytes() for word in words)]


def test_value_of_an_environment_variable_is_shown_and_written_nowhere(tmp_path: Path) -> None:
    write_files(tmp_path)
    validated = command(tmp_path, "validate", "--config", "config.json")
    resolved = command(tmp_path, "validate", "--config", "config.json", "--resolved")
    trained = command(tmp_path, "train", "--config", "config.json")
    assert [each.wait() for each in (validated, resolved, trained)] == [0, 0, 0], trained.errors()[-3000:]
    output = tmp_path / f"output {SECRET}" / "run"
    again = command(tmp_path, "train", "--config", "config.json", "max_train_steps=3")
    reported = command(tmp_path, "report", str(output))
    assert [each.wait() for each in (again, reported)] == [0, 0], again.errors()[-3000:]
    # Another value gives other targets, which the checkpoint was not made with.
    (tmp_path / f"output {SECRET}").rename(tmp_path / f"output {OTHER}")
    refused = command(tmp_path, "train", "--config", "config.json", "max_train_steps=4", secret=OTHER)
    assert refused.wait() == 1

    every = (validated, resolved, trained, again, reported, refused)
    for each in every:
        assert not [text for text in (each.output(), each.errors()) if "s3cret" in text or "v4lue" in text]
    assert NAMED in validated.output()
    assert json.loads(resolved.output())["validation_prompt"] == f"a {NAMED} cat"
    assert "lycoris apply_preset" in refused.errors()
    output = tmp_path / f"output {OTHER}" / "run"
    assert holding_a_value(output, tmp_path / "cache", tmp_path / f"output {OTHER}") == []
    check_files(output)
    shards = (tmp_path / "cache" / "text").glob("shard-*.safetensors")
    assert sum(len(read_index(shard)) for shard in shards) == 4


def check_files(output: Path) -> None:
    """The files that could hold the value hold the placeholder: so it went there."""
    with open_safetensors(output / ADAPTER_FILE, error=ValueError) as file:  # type: ignore[arg-type]
        header = file.metadata()
    assert header["base_model"].endswith(f"/model {NAMED}")
    assert header["trigger_words"] == f"{NAMED} toy"
    assert NAMED in header["lycoris_config"]
    for name in (CONFIG_FILE, RUN_MANIFEST_FILE, SUMMARY_FILE, PAGE_FILE):
        assert NAMED in (output / name).read_text(), name
    assert NAMED in (output / "checkpoint-2" / COMPATIBILITY_FILE).read_text()
    assert list((output / TENSORBOARD_FOLDER).iterdir())
    assert "digest" not in (output / CHANGES_FILE).read_text(), "the value was the same"
