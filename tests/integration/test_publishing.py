"""Runs that upload: what arrives works, and an upload neither delays nor ends a run."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from markdown_it import MarkdownIt
from PIL import Image

from simpletuner import cli
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.safetensors_file import read_metadata
from tests.hub_server import TOKEN, HubServer, serve
from tests.integration import processes
from tests.integration.tiny_runs import TinyRun, tiny_model

PROMPT = "a photo of `sks` | cat"
ADAPTER = "pytorch_lora_weights.safetensors"
KEYS = {
    "push_to_hub": True,
    "push_checkpoints_to_hub": True,
    "checkpoints_total_limit": 1,
    "hub_model_id": "https://huggingface.co/somebody/tiny-cat",
    "lora_format": "comfyui",
    "validation_disable": False,
    "validation_prompt": PROMPT,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
    "validation_guidance": 5.0,
    "validation_step_interval": 0,
    "disable_benchmark": True,
}
# The trainer's imports have fixed what the client asks before the environment of the process was its own.
SCRIPT = """
import os, sys
from huggingface_hub import constants
constants.ENDPOINT, constants.HF_HUB_OFFLINE = os.environ["HF_ENDPOINT"], os.environ["HF_HUB_OFFLINE"] == "1"
from simpletuner.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with serve(HubServer()) as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment.items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture(scope="module")
def uploaded(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Path]:
    """A finished run and a folder with the files of its repository."""
    run = TinyRun(tmp_path_factory.mktemp("uploaded"))
    assert run.run(**KEYS) == 0
    folder = tmp_path_factory.mktemp("downloaded")
    for name, content in server.repos["somebody/tiny-cat"].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return run, folder


def code_in(card: Path, language: str) -> str:
    tokens = MarkdownIt("commonmark").parse(card.read_text(encoding="utf-8"))
    code = [token.content for token in tokens if token.type == "fence" and token.info == language]
    return code[-1].replace("path/to/the/base/model", str(tiny_model()))


def test_a_run_uploads_its_files_and_those_of_every_checkpoint(uploaded: tuple[TinyRun, Path]) -> None:
    run, folder = uploaded
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.resolved.json",
        "grids/step-4.png",
        "images/00.png",
        "images/grid.png",
        "lycoris_config.json",
        ADAPTER,
        "pytorch_lora_weights_comfyui.safetensors",
        f"checkpoint-2/{ADAPTER}",
        f"checkpoint-4/{ADAPTER}",
    }
    assert json.loads((folder / "lycoris_config.json").read_text())["algo"] == "tlora"
    assert not (run.output_dir / "checkpoint-2").exists()
    sent = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert str(run.folder).encode() not in sent
    assert str(tiny_model().parent).encode() not in sent


def test_the_headers_of_the_files_label_what_is_in_them(uploaded: tuple[TinyRun, Path]) -> None:
    _, folder = uploaded
    own = read_metadata(folder / ADAPTER, error=ConfigError)
    exported = read_metadata(folder / "pytorch_lora_weights_comfyui.safetensors", error=ConfigError)
    assert (own["ss_network_dim"], own["ss_network_module"]) == ("8", "lycoris.kohya")
    assert (exported["ss_network_dim"], exported["ss_network_module"]) == ("16", "networks.lora")
    assert own["modelspec.title"] == exported["modelspec.title"] == "tiny-cat"
    assert own["modelspec.prediction_type"] == "epsilon"
    assert own["modelspec.hash_sha256"] != exported["modelspec.hash_sha256"]


def test_the_code_on_the_card_makes_the_image_on_the_card(
    uploaded: tuple[TinyRun, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = uploaded
    monkeypatch.chdir(folder)
    exec(compile(code_in(folder / "README.md", "python"), "card", "exec"), {})
    made = np.asarray(Image.open(folder / "image.png")).astype(int)
    assert np.abs(made - np.asarray(Image.open(folder / "images" / "00.png")).astype(int)).max() <= 1


def test_the_command_on_the_card_makes_the_image_on_the_card(
    uploaded: tuple[TinyRun, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    _, folder = uploaded
    monkeypatch.chdir(folder)
    words = shlex.split(code_in(folder / "README.md", "bash").replace("\\\n", ""))
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    made = np.asarray(Image.open(capsys.readouterr().out.strip())).astype(int)
    assert np.abs(made - np.asarray(Image.open(folder / "images" / "00.png")).astype(int)).max() <= 1


def test_without_a_login_a_run_ends_before_it_writes_anything_of_its_own(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotheranotheranother")
    run = TinyRun(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run.run(push_to_hub=True)
    assert caught.value.exit_code == 2
    assert not (run.output_dir / "config.resolved.json").exists()


def test_a_finished_run_that_is_started_again_uploads_what_is_missing(
    server: HubServer, tmp_path: Path
) -> None:
    run, keys = TinyRun(tmp_path), {"push_to_hub": True, "hub_model_id": "final", "max_train_steps": 1}
    assert run.run(**keys) == 0
    first = server.repos.pop("somebody/final").files
    assert {name for name in first if name.endswith(".safetensors")} == {ADAPTER}
    assert run.run(**keys) == 0
    assert server.repos["somebody/final"].files == first


def test_a_card_is_written_without_any_upload(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    assert run.run(max_train_steps=1) == 0
    assert (run.output_dir / "model-card" / "README.md").read_text().startswith("---\n")
    assert not (run.output_dir / "hub").exists()


@pytest.mark.xdist_group("processes")
def test_a_signal_ends_a_run_whose_upload_hangs_and_the_same_command_makes_up_for_it(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    own = {"max_train_steps": 2000, "hub_model_id": "stopped", "checkpoint_step_interval": 10}
    run.config(**KEYS | own)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with serve(HubServer(hangs="commit")) as hub:
        started = processes.start(
            script, "--config", tmp_path / "config.json", environment=os.environ | hub.environment
        )
        while not any("/commit/" in each for each in hub.requests):
            assert started.is_alive(), started.errors()
            time.sleep(0.02)
        started.terminate()
        stopped_s = time.monotonic()
        assert started.wait() == 75
        assert time.monotonic() - stopped_s < 20
        assert f"simpletuner publish {run.output_dir}" in started.errors()
        assert TOKEN not in started.errors()
    saved = {path.name for path in run.output_dir.glob("checkpoint-*")}
    assert saved
    with serve(HubServer()) as hub:
        again = processes.start(
            script,
            "--config",
            tmp_path / "config.json",
            f"max_train_steps={max(int(name.rpartition('-')[2]) for name in saved) + 1}",
            environment=os.environ | hub.environment,
        )
        assert again.wait() == 0, again.errors()
        files = hub.repos["somebody/stopped"].files
        assert {f"{name}/{ADAPTER}" for name in saved} | {ADAPTER} <= files.keys()
