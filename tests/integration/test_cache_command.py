"""`simpletuner cache` on the caches of a real run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.helpers.caching.maintenance import stats, stores_under
from simpletuner.helpers.models.sdxl.family import SDXL
from tests.integration.tiny_runs import TinyRun


def test_prune_keeps_what_a_configuration_uses_and_removes_what_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {"validation_prompt": "a cat", "validation_negative_prompt": "blurry"}
    pictures = {"validation_disable": False, "validation_num_inference_steps": 1, "disable_benchmark": True}
    run = TinyRun(tmp_path, keys={"max_train_steps": 1, **pictures, **prompts})
    assert run.run() == 0
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "image0.png")
    (tmp_path / "images" / "image1.txt").write_text("another caption")
    assert run.run(output_dir=str(tmp_path / "second")) == 0
    counted = {each.name: stats(each).entries for each in stores_under(tmp_path / "cache")}
    assert counted == {"pictures": 4, "text": 6}

    def never(*_: object) -> object:
        raise AssertionError("a weight is loaded or an entry made")

    monkeypatch.setattr(SDXL, "load_vae", never)
    monkeypatch.setattr(SDXL, "make_prompt_encoder", never)
    command = ["cache", "prune", str(tmp_path / "cache"), "--used-by", str(tmp_path / "config.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.findall(r"removed (\d+)", result.output) == ["1", "1"]
    assert run.run(output_dir=str(tmp_path / "third"), validation_disable=True) == 0
    for name, code in (("verify", 0), ("stats", 0)):
        result = CliRunner().invoke(app, ["cache", name, str(tmp_path / "cache")])
        assert result.exit_code == code, result.output


def test_verify_ends_with_1_for_damage_and_an_error_where_there_is_no_cache(tmp_path: Path) -> None:
    assert TinyRun(tmp_path, keys={"max_train_steps": 1}).run() == 0
    (shard,) = (tmp_path / "cache" / "vae" / "pictures").glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    result = CliRunner().invoke(app, ["cache", "verify", str(tmp_path / "cache")])
    assert result.exit_code == 1
    shard.write_bytes(data[:-1])
    result = CliRunner().invoke(app, ["cache", "verify", str(tmp_path / "cache")])
    assert result.exit_code == 1, "a shard that is cut short"
    result = CliRunner().invoke(app, ["cache", "stats", str(tmp_path / "images")])
    assert result.exit_code != 0
