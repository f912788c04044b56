"""`simpletuner compare`: one page of the same prompts and seeds with every checkpoint of some runs."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.errors import AdapterError, SimpleTunerError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.spec import SPEC
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl
from simpletuner.helpers.sampling import compared_images
from tests.integration.attached import attach_tlora
from tests.integration.synthetic_run import Page
from tests.integration.tiny_pipelines import load, trained_adapter_file
from tests.integration.tiny_runs import tiny_model
from tests.unit.models.tiny_clip import save_tiny_clip

PROMPT = 'a "photo" of <b>sks</b> 猫'
FAST = ("--steps", "1", "--dtype", "fp32")


@functools.cache
def other_file() -> Path:
    return trained_adapter_file(tlora_min_rank=5)


def run_of(folder: Path, **checkpoints: Path) -> Path:
    """The folder of a run whose checkpoints, by "step<n>", are copies of files."""
    folder.mkdir(parents=True)
    for name, file in checkpoints.items():
        checkpoint = folder / f"checkpoint-{name.removeprefix('step')}"
        checkpoint.mkdir()
        shutil.copy(file, checkpoint / ADAPTER_FILE)
    config = {
        "validation_resolution": "64x64",
        "validation_num_inference_steps": 2,
        "validation_guidance": 3.0,
        "validation_seed": 5,
    }
    (folder / "config.resolved.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"shots": [{"name": "a", "prompt": PROMPT}], "max_steps": 9}))
    return folder


def compared(output: Path, *arguments: object) -> Page:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments), "--output", str(output)])
    assert result.exit_code == 0, (result.output, result.exception)
    return Page((output / "compare.html").read_text(encoding="utf-8"))


def refused(*arguments: object) -> SimpleTunerError:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert isinstance(result.exception, SimpleTunerError), (result.output, result.exception)
    return result.exception


def images_of(page: Page) -> list[str]:
    """Title of each shown image's column."""
    return [str(each["alt"]).removeprefix(f"{PROMPT}, ") for each in page.all("img")]


def counter(calls: list[object], call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(family: Any, *arguments: object) -> Any:
        calls.append(family)
        return call(family, *arguments)

    return counted


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs on one base model, the first with two checkpoints."""
    first = run_of(tmp_path / "first", step2=trained_adapter_file(), step10=other_file())
    return [first, run_of(tmp_path / "second", step4=other_file())]


def test_each_checkpoint_has_the_image_that_sample_makes(runs: list[Path], tmp_path: Path) -> None:
    page = compared(tmp_path / "page", runs[0], "--dtype", "fp32")
    details = "64x64, seed 5"
    titles = ["base model", "first, step 2", "first, step 10"]
    assert images_of(page) == [f"{title}, {details}" for title in titles]
    assert "2 steps, guidance 3" in page.text
    assert PROMPT in page.text
    assert "died at step 10 of 9" in page.text
    assert not [each for each in page.all("link") + page.all("script") if "src" in each]
    sample = ["sample", runs[0] / "checkpoint-2", "--prompt", PROMPT, "--size", "64", "--guidance", "3"]
    sample += ["--steps", "2", "--seed", "5", "--dtype", "fp32", "--output", tmp_path / "sample"]
    assert CliRunner().invoke(app, [*map(str, sample)]).exit_code == 0
    (expected,) = (tmp_path / "sample").iterdir()
    made = [np.asarray(Image.open(file)) for file in (tmp_path / "page" / "images").iterdir()]
    assert [np.array_equal(each, np.asarray(Image.open(expected))) for each in made].count(True) == 1
    assert len({each.tobytes() for each in made}) == 3


def test_base_model_is_loaded_once_for_all_and_not_at_all_for_images_that_exist(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoisers: list[object] = []
    encoders: list[object] = []
    monkeypatch.setattr(SDXL, "load_denoiser", counter(denoisers, SDXL.load_denoiser))
    monkeypatch.setattr(SDXL, "make_prompt_encoder", counter(encoders, SDXL.make_prompt_encoder))
    first = compared(tmp_path / "page", *runs, *FAST)
    assert (len(denoisers), len(encoders)) == (1, 1)
    assert images_of(compared(tmp_path / "page", *runs, *FAST)) == images_of(first)
    assert (len(denoisers), len(encoders)) == (1, 1)
    compared(tmp_path / "page", *runs, *FAST, "--seed", 6)
    assert len(denoisers) == 2
    assert len([*(tmp_path / "page" / "images").iterdir()]) == 8


def test_strengths_and_open_ranks_have_columns_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    arguments = (runs[0], "--checkpoints", 1, "--strengths", "0.5,1", "--open-ranks", *FAST)
    page = compared(tmp_path / "page", *arguments)
    titles = [each.removesuffix(", 64x64, seed 5") for each in images_of(page)]
    step = "first, step 10"
    assert titles == [
        "base model",
        f"{step}, strength 0.5",
        step,
        f"{step}, strength 0.5, all ranks open",
        f"{step}, all ranks open",
    ]
    assert len({str(each["src"]) for each in page.all("img")}) == 5


def test_run_that_is_deleted_meanwhile_is_told_and_the_others_are_shown(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = compared_images.save_png

    def save_and_delete(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        shutil.rmtree(runs[1], ignore_errors=True)

    monkeypatch.setattr(compared_images, "save_png", save_and_delete)
    page = compared(tmp_path / "page", *runs, *FAST)
    assert len(images_of(page)) == 3
    assert "second, step 4: " in page.text
    assert "its log and its configuration are gone" in page.text


def test_page_without_any_image_of_a_run_ends_with_an_error(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AdapterError("does not fit")

    monkeypatch.setattr(compared_images, "attached", refuse)
    result = CliRunner().invoke(app, ["compare", str(runs[1]), *FAST, "--output", str(tmp_path / "page")])
    assert result.exit_code == 1
    assert "second, step 4 has no images: does not fit" in result.stdout


def test_damaged_file_is_told_and_the_others_are_shown(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "checkpoint-2" / ADAPTER_FILE).write_bytes(b"torn")
    page = compared(tmp_path / "page", *runs, *FAST)
    assert len(images_of(page)) == 3
    assert "first, step 2: " in page.text
    assert ADAPTER_FILE in str(refused(runs[0] / "checkpoint-2", "--output", tmp_path / "none"))


def test_runs_of_other_base_models_have_tables_of_their_own(runs: list[Path], tmp_path: Path) -> None:
    save_tiny_sdxl(tmp_path / "model", depth=1, seed=3)
    pipeline = load(tmp_path / "model")
    adapter = attach_tlora(pipeline.unet, SPEC, off_start=0.1)
    file = tmp_path / "other.safetensors"
    adapter.save(file, metadata={"base_model": str(tmp_path / "model"), "model_family": "sdxl"})
    page = compared(tmp_path / "page", runs[1], run_of(tmp_path / "third", step1=file), *FAST)
    assert [each.removesuffix(", 64x64, seed 5") for each in images_of(page)] == [
        "base model",
        "second, step 4",
        "base model",
        "third, step 1",
    ]
    assert len(page.all("section")) == 2
    assert str(tiny_model()) in page.text
    assert "tables of their own" in page.text


def test_whole_model_stands_beside_adapters_of_its_base_model(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(tmp_path / "whole")
    unet = load(tiny_model()).unet
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.5)
    folder = whole / "checkpoint-7" / "unet"
    unet.save_pretrained(folder)
    (weights,) = folder.glob("*.safetensors")
    header = {"base_model": str(tiny_model()), "model_family": "sdxl"}
    save_file(load_file(weights), weights, metadata=header)
    denoisers: list[object] = []
    monkeypatch.setattr(SDXL, "load_denoiser", counter(denoisers, SDXL.load_denoiser))
    page = compared(tmp_path / "page", whole, runs[1], "--open-ranks", "--strengths", "1,0.5", *FAST)
    titles = [each.removesuffix(", 64x64, seed 5") for each in images_of(page)]
    assert (titles[:2], len(titles), len(denoisers)) == (["base model", "whole, step 7"], 6, 2)
    assert len(page.all("section")) == 1
    assert len({str(each["src"]) for each in page.all("img")}) == 6


def test_lora_of_peft_leaves_nothing_for_the_next(runs: list[Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    plain = attach_adapter(
        load(tiny_model()).unet,
        AdapterConfig(lora_type="standard", lora_rank=4),
        lycoris=None,
        spec=SPEC,
        seed=0,
    )
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1)
    plain.save(lora, metadata={"base_model": str(tiny_model()), "model_family": "sdxl"})
    page = compared(tmp_path / "first", lora, runs[1], "--seed", 5, "--prompt", PROMPT, *FAST)
    alone = compared(tmp_path / "second", runs[1], "--seed", 5, *FAST)
    assert images_of(page)[1].startswith("lora, ")
    images = [str(each["src"]) for each in page.all("img")]
    assert len(set(images)) == 3
    assert [images[0], images[2]] == [str(each["src"]) for each in alone.all("img")]


def test_new_token_is_in_the_prompts_of_its_own_column_alone(runs: list[Path], tmp_path: Path) -> None:
    token, prompt = tmp_path / "token.safetensors", "a photo of <mine>"
    rows = {"clip_l": torch.full((1, 32), 3.0), "clip_g": torch.full((1, 32), -3.0)}
    header = {"placeholder_token": "<mine>", "initializer_token": "photo"}
    save_file(rows, token, metadata={"base_model": str(tiny_model()), "model_family": "sdxl", **header})
    given = ("--prompt", prompt, "--strengths", "1,0.5", *FAST)
    page = compared(tmp_path / "page", token, runs[1], *given)
    images = [str(each["src"]) for each in page.all("img")]
    assert len(images) == len(set(images)) == 5
    alone = compared(tmp_path / "alone", runs[1], *given)
    assert [images[0], *images[3:]] == [str(each["src"]) for each in alone.all("img")]


def test_run_without_its_configuration_needs_a_prompt(runs: list[Path], tmp_path: Path) -> None:
    for file in ("config.resolved.json", "run.json"):
        (runs[1] / file).unlink()
    output = ("--output", tmp_path / "page")
    assert "--prompt" in str(refused(runs[1], *output))
    page = compared(tmp_path / "page", runs[1], "--prompt", PROMPT, "--size", 64, "--seed", 1, *FAST)
    assert len(images_of(page)) == 2


def test_clip_model_scores_the_columns(runs: list[Path], tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    page = compared(tmp_path / "page", *runs, *FAST, "--clip-model", clip)
    assert "Highest CLIP score: " in page.text
    assert len(page.all("td")) == 4 + 4
    missing = refused(*runs, "--clip-model", tmp_path, "--output", tmp_path / "none")
    assert "--clip-model" in str(missing)
    assert not (tmp_path / "none").exists()


def test_other_noise_settings_of_training_are_no_other_model(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(tiny_model())
    adapter = attach_tlora(pipeline.unet, SPEC, off_start=0.1)
    file = tmp_path / "noise.safetensors"
    base = {"base_model": str(tiny_model()), "model_family": "sdxl"}
    adapter.save(file, metadata={**base, "snr_gamma": "5.0"})
    denoisers: list[object] = []
    monkeypatch.setattr(SDXL, "load_denoiser", counter(denoisers, SDXL.load_denoiser))
    page = compared(tmp_path / "page", runs[1], file, *FAST)
    assert len(page.all("section")) == len(denoisers) == 1
    assert len(images_of(page)) == 3


def test_base_model_is_left_as_it_was(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[nn.Module] = []
    load_denoiser = compared_images.load_denoiser

    def keep(*arguments: Any) -> nn.Module:
        kept.append(load_denoiser(*arguments))
        return kept[-1]

    monkeypatch.setattr(compared_images, "load_denoiser", keep)
    compared(tmp_path / "page", *runs, *FAST, "--open-ranks")
    (denoiser,) = kept
    fresh = load(tiny_model()).unet
    assert dict(denoiser.named_modules()).keys() == dict(fresh.named_modules()).keys()
    weights = fresh.state_dict()
    assert all(tensor.equal(weights[name]) for name, tensor in denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none",), "no such file"),
        (("empty",), "no other .safetensors"),
        (("first", "--strengths", "much"), "--strengths much"),
        (("first", "--steps", "0"), "--steps"),
        (("first", "--prompts-file", "none.txt"), "none.txt"),
    ],
    ids=["missing", "empty", "strengths", "steps", "prompts"],
)
def test_what_cannot_be_compared_is_said(
    arguments: tuple[str, ...],
    words: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert runs[0].is_dir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert words in str(refused(*arguments, "--output", "page"))
    assert not Path("page").exists()
