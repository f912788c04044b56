"""Masked runs: what a mask leaves out has no part in the adapter, in every kind of run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.contracts import NoisyBatch
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.family_runs import FLUX, KLEIN, SDXL, FamilyModel
from tests.integration.test_several_processes import tensors, train
from tests.integration.tiny_runs import TinyRun, gradients, reset_accelerate


def masked(run: TinyRun, *, kind: str = "mask", blank: int | None = None) -> TinyRun:
    """The run with masks that are white on the left; one of them may be black."""
    masks = run.folder / "masks"
    masks.mkdir(parents=True)
    for index in range(run.num_images):
        image = Image.new("RGB", (32, 32))
        if index != blank:
            image.paste((255, 255, 255), (0, 0, 16, 32))
        image.save(masks / f"image{index}.png")
    run.keys["data_backend_config"] = [
        {"id": "pictures", "instance_data_dir": str(run.folder / "images"), "conditioning_data": "masks"},
        {"id": "masks", "instance_data_dir": str(masks), "conditioning_type": kind},
    ]
    return run


def gradients_with(trainer: Trainer, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The adapter's gradients of the first batch, of which the target was changed."""
    add_noise = trainer.family.add_noise

    def changed(*arguments: Any, **options: Any) -> NoisyBatch:
        noisy = add_noise(*arguments, **options)
        return replace(noisy, target=change(noisy.target.clone()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.family, "add_noise", changed)
        trainer.train_step(next(iter(trainer.data.batches())))
    return gradients(trainer)


def right(target: Tensor) -> Tensor:
    target[..., target.shape[-1] // 2 :] += 1000
    return target


def left(target: Tensor) -> Tensor:
    target[..., : target.shape[-1] // 2] += 1
    return target


@pytest.mark.parametrize("model", [SDXL, FLUX, KLEIN], ids=lambda model: model.family)
def test_adapter_learns_nothing_of_what_is_masked_out(tmp_path: Path, model: FamilyModel) -> None:
    keys = {"gradient_checkpointing": False, "train_batch_size": 2}
    with masked(model.run(tmp_path)).trainer(**keys) as trainer:
        plain, outside, inside = (gradients_with(trainer, each) for each in (lambda each: each, right, left))
        batch = next(iter(trainer.data.batches()))
        noisy = trainer.objective.add_noise(batch)
        with trainer.trainable.rank_mask_for(noisy.timesteps):
            error = trainer.family.predict(trainer.denoiser, noisy, batch) - noisy.target
            width = error.shape[-1]
            # Half of the elements count, and the mean is over all of them.
            (error[..., : width // 2].square().mean() / 2).backward()
        expected = gradients(trainer)
    assert all(torch.equal(one, other) for one, other in zip(plain, outside, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in plain)
    for one, other in zip(plain, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_resumed_run_with_masks_is_exact(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "masked_loss_probability": 0.5,
        "unmasked_weight": 0.1,
        "normalize_masked_area_loss": True,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "constant",
        "checkpoint_step_interval": 2,
    }
    whole, parted = (masked(TinyRun(tmp_path / name), kind="segmentation") for name in ("whole", "parted"))
    assert whole.run(max_train_steps=4, **keys) == 0
    for steps in (2, 4):
        assert parted.run(max_train_steps=steps, **keys) == 0
    assert parted.log() == whole.log()
    with whole.trainer(max_train_steps=5, **keys) as trainer:
        masks = next(iter(trainer.data.batches(start=3))).loss_mask
        assert trainer.data.masks == trainer.config.masks
        assert masks is not None
    found, expected = (
        (each.output_dir / "pytorch_lora_weights.safetensors").read_bytes() for each in (parted, whole)
    )
    assert found == expected


def test_two_processes_train_with_masks_as_one_does(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "lr_scheduler": "constant",
        "optimizer_config": "eps=1e-3",
        "max_train_steps": 3,
        "masked_loss_probability": 0.5,
    }
    runs = {
        number: masked(TinyRun(tmp_path / str(number), num_images=5), kind="segmentation", blank=3)
        for number in (1, 2)
    }
    one = train(runs[1], num_processes=1, train_batch_size=2, **keys)
    two = train(runs[2], num_processes=2, train_batch_size=1, **keys)
    expected = tensors(one, "end-0")
    for rank in (0, 1):
        for key, tensor in tensors(two, f"end-{rank}").items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7)
    losses = [[row["loss"] for row in each.log()] for each in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-9)
    # Five images less the one whose mask is black.
    for run in (one, two):
        with run.trainer(max_train_steps=4) as trainer:
            assert len(trainer.data.samples) == 4
            assert [each.path for each in trainer.data.skipped] == ["image3.png"]


def test_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).parents[2]
    page = (repository / "documentation/masks.md").read_text(encoding="utf-8")
    written = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert written is not None
    config = json.loads(written[1])
    config["pretrained_model_name_or_path"] = str(repository / config["pretrained_model_name_or_path"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, image in (
        ("cat", Image.new("RGB", (64, 64), (9, 80, 200))),
        ("cat-masks", Image.new("L", (64, 64), 99)),
    ):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.save(tmp_path / "images" / name / "1.png")
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    trainer = build_trainer(load_config(Path("config.json"), families=registry.specs()))
    assert trainer.run() == 0
    assert (tmp_path / config["output_dir"] / "pytorch_lora_weights.safetensors").is_file()
