"""`simpletuner sample`: pictures from nothing but an adapter file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from tests.integration.attached import command
from tests.integration.tiny_pipelines import load, trained_adapter_file
from tests.integration.tiny_runs import TinyRun, tiny_model

PROMPT = "a photo of sks cat"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def small(output: Path) -> tuple[object, ...]:
    return "--size", "64", "--steps", 3, "--guidance", 5, "--output", output


def test_pictures_are_those_of_the_pipeline_that_loads_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained_adapter_file()
    prompts = ("--prompt", PROMPT, "--prompt", "a dog")
    assert (
        command(
            monkeypatch, "sample", "--adapter", file, *prompts, "--count", 2, "--seed", 5, *small(tmp_path)
        )
        == 0
    )
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(written) == len(set(written)) == 4
    assert sorted(tmp_path.iterdir()) == sorted(written)
    pipeline = load(tiny_model())
    load_into_pipeline(pipeline, file, strength=1.0)
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
    expected = pipeline(PROMPT, generator=generator, **options).images[0]
    assert np.abs(pixels(written[0]).astype(int) - np.asarray(expected)).max() <= 1


def test_a_second_guidance_is_refused_for_a_family_that_has_one_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--adapter", trained_adapter_file(), "--prompt", PROMPT, "--guidance-real", 2)
    assert command(monkeypatch, "sample", *arguments, *small(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert "--guidance-real" in message
    assert "means nothing to --family sdxl" in message


def test_strength_zero_is_the_base_model_and_the_default_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    for strength in (0, 1):
        folder = tmp_path / str(strength)
        arguments = ("--adapter", trained_adapter_file(), "--prompt", PROMPT, "--strength", strength)
        assert command(monkeypatch, "sample", *arguments, *small(folder)) == 0
        pictures.append(pixels(next(folder.iterdir())).astype(int))
    base = load(tiny_model())(
        PROMPT, num_inference_steps=3, guidance_scale=5.0, height=64, width=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.abs(pictures[0] - np.asarray(base)).max() <= 1
    assert np.abs(pictures[1] - pictures[0]).max() > 3


def test_standard_lora_of_a_run_is_sampled_at_its_own_alpha(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TinyRun(tmp_path / "run")
    keys = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 0.05}
    assert training.run(**keys) == 0
    file = training.output_dir / ADAPTER_FILE
    assert (
        command(monkeypatch, "sample", "--adapter", file, "--prompt", PROMPT, *small(tmp_path / "out")) == 0
    )
    pipeline = load(tiny_model())
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
    expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]
    made = pixels(next((tmp_path / "out").iterdir())).astype(int)
    assert np.abs(made - np.asarray(expected)).max() <= 1


def test_file_without_a_header_needs_the_model_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(trained_adapter_file()), bare)
    arguments = ("--adapter", bare, "--prompt", PROMPT, *small(tmp_path / "out"))
    assert command(monkeypatch, "sample", *arguments) == 2
    assert "--family and --model" in capsys.readouterr().err
    assert command(monkeypatch, "sample", *arguments, "--family", "sdxl", "--model", tiny_model()) == 0


def test_image_without_a_size_has_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    config = json.loads((model / "unet" / "config.json").read_text())
    stages = len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"])
    (model / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 12}))
    given = ("--adapter", trained_adapter_file(), "--model", model, "--prompt", PROMPT, "--steps", 1)
    assert command(monkeypatch, "sample", *given, "--output", tmp_path / "out") == 0
    assert pixels(Path(capsys.readouterr().out.strip())).shape[0] == 12 * 2 ** (stages - 1)


def test_images_of_an_earlier_call_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--adapter", trained_adapter_file(), "--prompt", PROMPT, *small(tmp_path), "--steps", 1)
    assert command(monkeypatch, "sample", *given) == 0
    (first,) = tmp_path.iterdir()
    before = first.read_bytes()
    assert command(monkeypatch, "sample", *given, "--seed", 0) == 0
    assert first.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([first, first.with_stem(f"{first.stem}-2")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "100x100"), "--size  "),
        (("--steps", 0), "--steps  "),
        (("--scheduler", "eulre"), "--scheduler  "),
        (("--model", "/nowhere"), "--model  "),
        (("--family", "sdlx"), "Known families: "),
        (("--size", "100", "--count", 0), "--count  "),
    ],
)
def test_value_that_cannot_be_used_is_named_by_its_option(
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--adapter", trained_adapter_file(), "--prompt", PROMPT, "--output", tmp_path / "out")
    assert command(monkeypatch, "sample", *given, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_file_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "sample", "--adapter", tmp_path / "none.safetensors", "--prompt", PROMPT) == 1
    assert "no such file" in capsys.readouterr().err


def test_model_that_the_header_names_by_an_environment_variable_is_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOY_MODELS", str(tiny_model().parent))
    named, header = (
        tmp_path / "named.safetensors",
        {"base_model": "{env:TOY_MODELS}/a", "model_family": "sdxl"},
    )
    save_file(load_file(trained_adapter_file()), named, metadata=header)
    assert command(monkeypatch, "sample", "--adapter", named, "--prompt", PROMPT, *small(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "{env:TOY_MODELS}/a" in message
    assert "--model" in message
