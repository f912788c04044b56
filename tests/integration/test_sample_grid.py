"""`simpletuner sample`: grids, prompts of files, images to start from, open ranks."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner, Result

from simpletuner.cli import app
from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.errors import ConfigError, SimpleTunerError
from simpletuner.helpers.models.flux2 import pipeline as flux2
from simpletuner.helpers.models.flux2.family import Flux2
from simpletuner.helpers.models.flux2.spec import SPEC as FLUX2
from simpletuner.helpers.models.sdxl.pipeline import StableDiffusionXLPipeline
from tests.integration import flux_pipelines
from tests.integration.attached import attach_tlora
from tests.integration.family_runs import tiny_flux2
from tests.integration.tiny_pipelines import load, trained_adapter_file
from tests.integration.tiny_runs import tiny_model

PROMPT = "a photo of sks cat"
RANDOM = np.random.default_rng(0)
PICTURE = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.repeat([[0], [255]], 32, axis=0).repeat(64, axis=1).astype(np.uint8))
STRENGTH = 0.7
STEPS = 4
CALL = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "strength": STRENGTH}


def sampled(file: Path, output: Path, *arguments: object) -> list[Path]:
    """The files of `simpletuner sample` with a 64 px image of the prompt."""
    given = [
        "sample",
        file,
        "--size",
        "64",
        "--guidance",
        5,
        "--dtype",
        "fp32",
        "--output",
        output,
        *arguments,
    ]
    result = CliRunner().invoke(app, [*map(str, given)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [Path(line) for line in result.stdout.splitlines()]


def refused(*arguments: object, file: Path | None = None) -> SimpleTunerError:
    given = ["sample", file or trained_adapter_file(), *arguments]
    result: Result = CliRunner().invoke(app, [*map(str, given)])
    assert isinstance(result.exception, SimpleTunerError), result.output
    return result.exception


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def parameters(file: Path) -> str:
    return str(Image.open(file).info["parameters"])


@pytest.fixture
def start(tmp_path: Path) -> tuple[Path, Path]:
    """The files of an image and a mask whose lower half is repainted."""
    files = tmp_path / "start 猫.png", tmp_path / "mask.png"
    PICTURE.save(files[0])
    MASK.save(files[1])
    return files


def test_grid_has_a_column_for_each_strength_and_number_of_steps(tmp_path: Path) -> None:
    file = trained_adapter_file()
    seeds = ("--prompt", PROMPT, "--seed", 8, "--seed", 3)
    *made, grid = sampled(file, tmp_path / "grid", *seeds, "--strengths", "0,1", "--steps", "1,2")
    assert [each.name.partition("64x64-")[2] for each in made] == [
        f"seed{seed}-strength_{strength}_{steps}_steps.png"
        for seed in (8, 3)
        for strength in (0, 1)
        for steps in (1, 2)
    ]
    assert Image.open(grid).width > 4 * 128
    single = sampled(file, tmp_path / "one", "--prompt", PROMPT, "--seed", 3, "--steps", 2)
    assert len(single) == 1
    assert np.array_equal(pixels(single[0]), pixels(made[7]))
    assert not np.array_equal(pixels(made[7]), pixels(made[5]))
    assert "Steps: 2, " in parameters(made[7])
    assert "Seed: 3, Size: 64x64" in parameters(made[7])
    assert "Adapter strength: 0" in parameters(made[5])


def test_prompts_of_a_text_and_of_a_json(tmp_path: Path) -> None:
    lines, library = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    lines.write_text("a dog\n\n  赤い猫 \n", encoding="utf-8")
    library.write_text(json.dumps({"base": {"prompt": PROMPT, "adapter_strength": 0}, "full": PROMPT}))
    file, fast = trained_adapter_file(), ("--steps", 1)
    made = sampled(file, tmp_path / "lines", *fast, "--prompt", PROMPT, "--prompts-file", lines)
    assert [parameters(each).splitlines()[0] for each in made] == [PROMPT, "a dog", "赤い猫"]
    own = sampled(file, tmp_path / "own", *fast, "--prompts-file", library)
    assert [each.name[:7] for each in own] == ["00-base", "01-full"]
    assert not np.array_equal(pixels(own[0]), pixels(own[1]))
    given = sampled(file, tmp_path / "given", *fast, "--prompts-file", library, "--strength", 1)
    assert np.array_equal(pixels(given[0]), pixels(own[1]))


@pytest.mark.parametrize("is_masked", [False, True], ids=["image", "mask"])
def test_image_from_an_image_without_the_adapter_is_that_of_diffusers(
    is_masked: bool, start: tuple[Path, Path], tmp_path: Path
) -> None:
    image, mask_file = start
    more = ("--mask", mask_file) if is_masked else ()
    arguments = ("--prompt", PROMPT, "--image", image, "--denoising-strength", STRENGTH, "--steps", STEPS)
    (base,) = sampled(trained_adapter_file(), tmp_path / "0", *arguments, *more, "--strength", 0)
    (adapted,) = sampled(trained_adapter_file(), tmp_path / "1", *arguments, *more)
    if is_masked:
        pipeline = load(tiny_model(), diffusers.StableDiffusionXLInpaintPipeline)
        call = CALL | {"mask_image": MASK, "height": 64, "width": 64}
    else:
        pipeline, call = load(tiny_model(), diffusers.StableDiffusionXLImg2ImgPipeline), CALL
    generator = torch.Generator().manual_seed(0)
    expected = pipeline(PROMPT, image=PICTURE, generator=generator, **call).images[0]
    # The embeds of a prompt differ in the last bits with the prompts that are encoded with it.
    assert np.abs(pixels(base) - np.asarray(expected)).max() <= 1
    assert np.abs(pixels(adapted) - pixels(base)).max() > 3
    assert "Denoising strength: 0.7" in parameters(adapted)
    if is_masked:
        top = np.abs(pixels(base)[:24] - np.asarray(PICTURE)[:24]).mean()
        assert top < np.abs(pixels(base)[40:] - np.asarray(PICTURE)[40:]).mean()


@functools.cache
def adapter_of(family: str) -> Path:
    """A T-LoRA file of a tiny model of the family."""
    if family == "sdxl":
        return trained_adapter_file()
    if family == "flux":
        pipeline, model = flux_pipelines.TEXT_TO_IMAGE.make(), flux_pipelines.tiny_flux()
        adapter = flux_pipelines.attach(pipeline)
    else:
        model = tiny_flux2(family)
        kind = flux2.Flux2Pipeline if family == "dev" else flux2.Flux2KleinPipeline
        pipeline = kind.from_pretrained(model, use_safetensors=True)
        adapter = attach_tlora(pipeline.transformer, FLUX2, off_start=0.1)
    file = Path(tempfile.mkdtemp(prefix="tiny_adapter_")) / "adapter.safetensors"
    name = family if family == "flux" else "flux2"
    adapter.save(file, metadata={"base_model": str(model), "model_family": name})
    return file


def recorded(values: list[int], call: Callable[..., Any], *, place: int) -> Callable[..., Any]:
    def record(*arguments: Any, **options: Any) -> Any:
        given = arguments[place]
        values.append(int(given[0] if isinstance(given, list) else given))
        return call(*arguments, **options)

    return record


STARTS = [("sdxl", False), ("sdxl", True), ("flux", False), ("flux", True), ("klein", True)]
"""Family, and whether a part is repainted."""


@pytest.mark.parametrize(
    ("family", "is_masked"),
    [each if each[0] == "flux" else pytest.param(*each, marks=pytest.mark.slow) for each in STARTS],
)
def test_image_starts_a_16_bit_model_beside_its_vae_in_float32(
    family: str, is_masked: bool, start: tuple[Path, Path], tmp_path: Path
) -> None:
    more = ("--mask", start[1]) if is_masked else ()
    given = ("--prompt", PROMPT, "--image", start[0], "--steps", 2, "--dtype", "bf16")
    assert len(sampled(adapter_of(family), tmp_path / "out", *given, *more)) == 1


@pytest.mark.parametrize(("family", "is_masked"), STARTS)
def test_ranks_follow_each_step_from_an_image(
    family: str,
    is_masked: bool,
    start: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masked: list[int] = []
    stepped: list[int] = []
    monkeypatch.setattr(mask, "set_mask", recorded(masked, mask.set_mask, place=1))
    for scheduler in (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler):
        monkeypatch.setattr(scheduler, "step", recorded(stepped, scheduler.step, place=2))
    more = ("--mask", start[1]) if is_masked else ()
    given = ("--prompt", PROMPT, "--image", start[0], "--denoising-strength", STRENGTH, "--steps", STEPS)
    sampled(adapter_of(family), tmp_path / "out", *given, *more)
    assert list(dict.fromkeys(masked)) == stepped
    assert len(stepped) in (2, 3), "0.7 of 4 steps"


def test_open_ranks_are_those_of_a_schedule_that_opens_all(tmp_path: Path) -> None:
    file = trained_adapter_file()
    given = ("--prompt", PROMPT, "--steps", 3)
    (opened,) = sampled(file, tmp_path / "open", *given, "--open-ranks")
    (scheduled,) = sampled(file, tmp_path / "scheduled", *given)
    pipeline = load(tiny_model(), StableDiffusionXLPipeline)
    load_into_pipeline(pipeline, file)
    pipeline._tlora_config = {"max_rank": 8, "min_rank": 8, "alpha": 1.0}
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
    expected = pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **call).images[0]
    assert np.abs(pixels(opened) - np.asarray(expected)).max() <= 1
    assert np.abs(pixels(opened) - pixels(scheduled)).max() > 3
    assert "Rank schedule: min_rank 8" in parameters(opened)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--prompt or --prompts-file",)),
        (("--prompts-file", "none.txt"), ("none.txt", "not found")),
        (("--prompts-file", "."), ("cannot be read",)),
        (("--prompt", PROMPT, "--mask", "mask.png"), ("--image",)),
        (("--prompt", PROMPT, "--image", "none.png"), ("none.png", "cannot read")),
        (("--prompt", PROMPT, "--image", "."), ("cannot read",)),
        (("--prompt", PROMPT, "--image", "small.png", "--mask", "mask.png"), ("32x32", "64x64")),
        (("--prompt", PROMPT, "--image", "mask.png", "--denoising-strength", 1.5), ("at most 1",)),
        (
            ("--prompt", PROMPT, "--image", "mask.png", "--denoising-strength", 0.1, "--steps", 4),
            ("one step",),
        ),
        (("--prompt", PROMPT, "--image", "mask.png", "--reference", "mask.png"), ("exclude each other",)),
        (("--prompt", PROMPT, "--open-ranks", "--schedule", "min_rank=2"), ("exclude each other",)),
        (("--prompt", PROMPT, "--steps", "2,x"), ("--steps", "x")),
        (("--prompt", PROMPT, "--strengths", "0.5,much"), ("--strength", "much")),
    ],
    ids=lambda value: "-".join(map(str, value)).replace(" ", "_")[:40] or "nothing",
)
def test_what_cannot_be_sampled_is_said(
    arguments: tuple[object, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MASK.save(tmp_path / "mask.png")
    PICTURE.resize((32, 32)).save(tmp_path / "small.png")
    monkeypatch.chdir(tmp_path)
    message = str(refused(*arguments, "--output", "out"))
    assert all(word in message for word in words), message
    assert not Path("out").exists()


def test_family_without_such_a_pipeline_says_so_before_its_weights_are_loaded(
    start: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flux2, "load_text_encoders", lambda _: pytest.fail("loaded"))
    given = ("--prompt", PROMPT, "--image", start[0])
    assert "Give --mask too" in str(refused(*given, file=adapter_of("klein")))
    error = refused(*given, "--mask", start[1], file=adapter_of("dev"))
    assert isinstance(error, ConfigError)
    assert "repaints" in str(error)
