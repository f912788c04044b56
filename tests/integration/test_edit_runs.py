"""Runs on tiny models that take reference images."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from simpletuner import cli
from simpletuner.helpers.contracts import Batch, TextEmbeds
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.sampling.images import LABEL_WIDTH_PX, MARGIN_PX, SMALLEST_CELL_PX
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.attached import command
from tests.integration.family_runs import DEV, FLUX, IMAGES, KLEIN, FamilyModel
from tests.integration.tiny_pipelines import trained_adapter_file
from tests.integration.tiny_runs import TinyRun

PROMPT = "make it red"
SIZE = (64, 80)
"""Width and height of the images."""
KEYS = {
    **IMAGES,
    "learning_rate": 0.02,
    "lr_scheduler": "constant",
    "validation_prompt": None,
    "aspect_bucket_alignment": 16,
}
FAMILIES = pytest.mark.parametrize(
    ("model", "keys"),
    [(FLUX, {"model_flavour": "kontext"}), (KLEIN, {}), (DEV, {})],
    ids=["kontext", "klein", "dev"],
)


def save_reference(file: Path, colour: str, size: tuple[int, int] = SIZE) -> Path:
    Image.new("RGB", size, colour).save(file)
    return file


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def images_of(run: TinyRun, folder: str = "step-2") -> dict[str, np.ndarray]:
    """Name of a prompt -> its image in a folder of the validation."""
    files = sorted((run.output_dir / "validation" / folder).glob("*.png"))
    return {file.stem.split("-")[1]: pixels(file) for file in files if file.name != "grid.png"}


def write_prompts(run: TinyRun, **references: object) -> str:
    """A library with the same prompt for each name, and these reference images."""
    library = run.folder / "prompts.json"
    entries = {name: {"prompt": PROMPT, "image": files} for name, files in references.items()}
    library.write_text(json.dumps(entries))
    return str(library)


@FAMILIES
def test_validation_images_depend_on_their_references_alone(
    model: FamilyModel, keys: dict[str, object], tmp_path: Path
) -> None:
    run = model.run(tmp_path)
    colours = {"one": "black", "other": "white", "copy": "black", "wide": "red"}
    one, other, copy, wide = (
        str(save_reference(tmp_path / f"{name}.png", colour, (192, 64) if name == "wide" else SIZE))
        for name, colour in colours.items()
    )
    library = write_prompts(run, one=one, other=other, copy=copy, both=[one, wide], none=[])
    assert run.run(max_train_steps=2, user_prompt_library=library, **KEYS, **keys) == 0
    shots = json.loads((run.output_dir / "run.json").read_text())["shots"]
    assert [each.get("references", []) for each in shots] == [
        ["one.png"],
        ["other.png"],
        ["copy.png"],
        ["one.png", "wide.png"],
        [],
    ]
    with Image.open(run.output_dir / "validation" / "step-2" / "grid.png") as grid:
        assert grid.width == LABEL_WIDTH_PX + MARGIN_PX + 3 * (SMALLEST_CELL_PX + MARGIN_PX)
    for folder in ("step-2", "base"):
        found = images_of(run, folder)
        assert found.keys() == {"one", "other", "copy", "both", "none"}
        assert {each.shape for each in found.values()} == {(SIZE[1], SIZE[0], 3)}
        assert np.array_equal(found["one"], found["copy"])
        for name in ("other", "both", "none"):
            # By a value or two: the tiny model is hardly trained.
            assert not np.array_equal(found["one"], found[name])


def test_sample_command_gives_the_image_of_the_validation(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    references = [str(save_reference(tmp_path / f"{name}.png", name, (128, 64))) for name in ("black", "red")]
    library = write_prompts(run, both=references)
    keys = {**KEYS, "model_flavour": "kontext", "aspect_bucket_alignment": None}
    assert run.run(max_train_steps=2, user_prompt_library=library, **keys) == 0
    arguments = ["sample", str(run.output_dir / ADAPTER_FILE), "--prompt", PROMPT, "--size", "64x80"]
    arguments += ["--steps", "3", "--seed", "5"]
    made = []
    for number, given in enumerate((references, references[::-1])):
        options = [option for file in given for option in ("--reference", file)]
        folder = tmp_path / f"samples-{number}"
        result = CliRunner().invoke(cli.app, [*arguments, *options, "--output", str(folder)])
        assert result.exit_code == 0, result.output
        made.append(pixels(next(folder.iterdir())))
    expected = images_of(run)["both"]
    assert np.abs(made[0] - expected).max() <= 1
    assert not np.array_equal(made[1], made[0]), "in the other order"


def test_sample_command_refuses_references_of_a_family_that_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_reference(tmp_path / "a.png", "red")
    arguments = (trained_adapter_file(), "--prompt", PROMPT, "--reference", file, "--reference", "none.png")
    assert command(monkeypatch, "sample", *arguments) == 2
    message = capsys.readouterr().err
    assert "none.png" in message
    assert command(monkeypatch, "sample", *arguments[:-2]) == 2
    assert "--reference  sdxl takes no reference images" in capsys.readouterr().err


def test_cached_image_belongs_to_its_references_and_their_cut(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    references = [str(save_reference(tmp_path / f"{name}.png", name, (96, 64))) for name in ("black", "red")]
    library = write_prompts(run, both=references)
    keys = {**KEYS, "model_flavour": "kontext", "user_prompt_library": library}
    with run.trainer(max_train_steps=2, **keys) as trainer:
        sampler = trainer.validation.sampler
        (prompt,) = sampler.prompts
        assert [each.pixels.shape for each in prompt.references] == [(3, 64, 80), (3, 64, 80)]
        swapped = replace(prompt, references=prompt.references[::-1])
        again = replace(prompt, references=tuple(replace(each) for each in prompt.references))
        assert sampler.cached_path(again) == sampler.cached_path(prompt)
        assert sampler.cached_path(swapped) != sampler.cached_path(prompt)


def contrasted(model: FamilyModel, folder: Path) -> Path:
    """A copy of the tiny model whose black and white images differ in latents as much as two noises do."""
    copy = Path(shutil.copytree(model.folder(), folder))
    config = copy / "vae" / "config.json"
    settings = json.loads(config.read_text())
    if "scaling_factor" in settings:
        settings["scaling_factor"] *= 8
        config.write_text(json.dumps(settings))
    else:
        (file,) = (copy / "vae").glob("*.safetensors")
        weights = load_file(file)
        weights["bn.running_mean"] *= 0
        weights["bn.running_var"] /= 24
        save_file(weights, file, metadata={"format": "pt"})
    return copy


def save_pairs(run: TinyRun, kind: str) -> None:
    """Pairs whose images are their references: two black ones, two white ones, with the same caption."""
    before, after = run.folder / "before", run.folder / "after"
    for folder in (before, after):
        folder.mkdir()
        for number, colour in enumerate(("black", "white") * 2):
            save_reference(folder / f"{number}.png", colour, (64, 64))
    captioned = {"caption_strategy": "instanceprompt", "instance_prompt": PROMPT}
    entries = [
        {"id": "after", "instance_data_dir": str(after), "conditioning_data": "before", **captioned},
        {"id": "before", "instance_data_dir": str(before), "conditioning_type": kind},
    ]
    run.keys["data_backend_config"] = entries


def losses(trainer: Trainer) -> dict[bool, float]:
    """Mean loss of a black and a white image beside references of its own colour, and of the other one."""
    family, text = trainer.family, trainer.data.text_embeds(PROMPT)
    family.load_vae()
    latents = family.encode_images(torch.stack([torch.full((3, 64, 64), value) for value in (-1.0, 1.0)]))
    found: dict[bool, list[float]] = {True: [], False: []}
    for index in range(0, 32, 2):
        noisy = family.add_noise(latents, sample_indices=[index, index + 1], seed=1)
        for is_own, references in ((True, latents), (False, latents.flip(0))):
            batch = Batch(latents, TextEmbeds.stack([text, text]), (), (), references=(references,))
            with torch.no_grad(), trainer.trainable.rank_mask_for(noisy.timesteps):
                prediction = family.predict(trainer.denoiser, noisy, batch)
            found[is_own].append(float((prediction - noisy.target).square().mean()))
    return {is_own: float(np.mean(each)) for is_own, each in found.items()}


@pytest.mark.parametrize(
    ("model", "kind", "keys"),
    [
        (FLUX, "reference_strict", {"model_flavour": "kontext", "train_batch_size": 2}),
        (
            KLEIN,
            "reference_loose",
            {
                "base_model_precision": "int8-torchao",
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": False,
            },
        ),
    ],
    ids=["kontext", "klein"],
)
def test_a_run_on_pairs_learns_to_look_at_the_reference(
    model: FamilyModel, kind: str, keys: dict[str, object], tmp_path: Path
) -> None:
    run = model.run(tmp_path, {**model.tlora, "linear_dim": 16, "linear_alpha": 16, "tlora_min_rank": 12})
    save_pairs(run, kind)
    black, white = (
        str(save_reference(tmp_path / f"{name}.png", name, (96, 64))) for name in ("black", "white")
    )
    steps = 100
    settings = {
        **KEYS,
        "pretrained_model_name_or_path": str(contrasted(model, tmp_path / "model")),
        "user_prompt_library": write_prompts(run, black=black, white=white, again=black),
        "max_train_steps": steps,
        "learning_rate": 0.03,
        "lr_warmup_steps": 0,
        "validation_step_interval": 0,
        "checkpoint_step_interval": 0,
        **keys,
    }
    with run.trainer(**settings) as trainer:
        prompts = trainer.validation.sampler.prompts
        cuts = {each.pixels.shape[1:] for prompt in prompts for each in prompt.references}
        assert cuts == {(80, 64) if kind == "reference_strict" else (64, 80)}
        before = losses(trainer)
        assert trainer.run() == 0
        after = losses(trainer)
    assert after[True] < before[True] - 0.1
    assert after[False] - after[True] > 50 * abs(before[False] - before[True])
    base, trained = images_of(run, "base"), images_of(run, f"step-{steps}")
    influence = [np.abs(each["black"] - each["white"]).max() for each in (base, trained)]
    assert influence[1] > influence[0]
    assert np.array_equal(trained["black"], trained["again"])
