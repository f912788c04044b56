"""Regularisation data: towards the base model's prediction or the image, exact in every kind of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.contracts import Batch
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.test_several_processes import ON_CPU_TOO, tensors, train
from tests.integration.tiny_runs import TLORA, TinyRun, gradients

LORA = {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4}
ADAPTERS: dict[str, dict[str, Any]] = {
    "T-LoRA": {},
    "T-LoRA checkpointed": {"gradient_checkpointing": True},
    "DoRA": {**LORA, "use_dora": True},
    "DoRA by LyCORIS": {
        "lycoris_config": {**TLORA, "algo": "lora", "weight_decompose": True, "tlora_min_rank": None}
    },
    "T-LoRA on int8": {"base_model_precision": "int8-torchao"},
    "LoRA with offloading": {
        **LORA,
        "gradient_checkpointing": True,
        "enable_group_offload": True,
        "group_offload_type": "leaf_level",
    },
}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return with_class(tmp_path)


def with_class(folder: Path, *, num_class: int = 4, num_images: int = 4) -> TinyRun:
    """A run on a subject and its class."""
    others = TinyRun(folder / "class", num_images=num_class)
    made = TinyRun(folder, num_images=num_images)
    made.keys["data_backend_config"] = [
        {"id": "subject", "instance_data_dir": str(made.folder / "images")},
        {"id": "class", "instance_data_dir": str(others.folder / "images"), "is_regularisation_data": True},
    ]
    return made


def first_batch(trainer: Trainer, *, is_regularisation: bool) -> Batch:
    return next(each for each in trainer.data.batches() if each.is_regularisation is is_regularisation)


def move_away_from_zero(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trainable.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def expected_gradients(
    trainer: Trainer, batch: Batch, *, target: Tensor | None, weight: float
) -> list[Tensor]:
    """Of the weighted squared distance of the masked student to a target; None is the family's own target."""
    noisy = trainer.objective.add_noise(batch)
    with trainer.trainable.rank_mask_for(noisy.timesteps):
        prediction = trainer.family.predict(trainer.denoiser, noisy, batch)
        error = prediction - (noisy.target if target is None else target)
        (error.square().mean() * weight).backward()  # type: ignore[no-untyped-call]
    return gradients(trainer)


def base_prediction(trainer: Trainer, batch: Batch, **keys: Any) -> Tensor:
    """The prediction of a model that never had an adapter."""
    if keys.get("base_model_precision"):
        trainer.trainable.detach()
        denoiser = trainer.denoiser
    else:
        denoiser = trainer.family.load_denoiser()
    with torch.no_grad():
        return trainer.family.predict(denoiser, trainer.objective.add_noise(batch), batch)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_regularisation_batch_is_trained_towards_the_base_model(run: TinyRun, adapter: str) -> None:
    keys = {"gradient_checkpointing": False, "train_batch_size": 2, **ADAPTERS[adapter]}
    with run.trainer(prior_loss_weight=0.5, **keys) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer, is_regularisation=True)
        grad_enabled: list[bool] = []
        hook = trainer.denoiser.register_forward_pre_hook(
            lambda *_: grad_enabled.append(torch.is_grad_enabled())
        )
        output = trainer.train_step(batch)
        hook.remove()
        found = gradients(trainer)
        assert grad_enabled == [False, True], "the teacher has no gradient, and runs before the student"
        target = None if "int8" in adapter else base_prediction(trainer, batch)
        if target is None:  # packed weights cannot be loaded a second time
            with trainer.trainable.switched_off(), torch.no_grad():
                noisy = trainer.objective.add_noise(batch)
                target = trainer.family.predict(trainer.denoiser, noisy, batch)
        expected = expected_gradients(trainer, batch, target=target, weight=0.5)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)
    assert output.loss > 0


def test_student_at_its_start_is_the_teacher(run: TinyRun) -> None:
    with run.trainer(gradient_checkpointing=False) as trainer:
        output = trainer.train_step(first_batch(trainer, is_regularisation=True))
    assert output.loss == 0


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_target_data_is_an_ordinary_target(run: TinyRun, weight: float) -> None:
    keys = {"regularisation_target": "data", "prior_loss_weight": weight, "gradient_checkpointing": False}
    with run.trainer(**keys) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer, is_regularisation=True)
        trainer.train_step(batch)
        found = gradients(trainer)
        expected = expected_gradients(trainer, batch, target=None, weight=weight)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


def test_other_batches_are_trained_as_without_regularisation(run: TinyRun) -> None:
    with run.trainer(prior_loss_weight=0.25, gradient_checkpointing=False) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer, is_regularisation=False)
        trainer.train_step(batch)
        found = gradients(trainer)
        expected = expected_gradients(trainer, batch, target=None, weight=1.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.reliability_row(4)
@pytest.mark.parametrize("target", ["base", "data"])
def test_resumed_run_with_regularisation_is_exact(tmp_path: Path, target: str) -> None:
    keys: dict[str, Any] = {
        "regularisation_target": target,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "constant",
        "checkpoint_step_interval": 3,
    }
    whole, parted = (with_class(tmp_path / name, num_class=3) for name in ("whole", "parted"))
    assert whole.run(max_train_steps=6, **keys) == 0
    for steps in (3, 6):
        assert parted.run(max_train_steps=steps, **keys) == 0
    assert parted.log() == whole.log()
    found, expected = (
        (each.output_dir / "pytorch_lora_weights.safetensors").read_bytes() for each in (parted, whole)
    )
    assert found == expected


def test_prior_loss_is_logged_where_there_is_one(run: TinyRun) -> None:
    assert run.run(max_train_steps=8, checkpoint_step_interval=0) == 0
    with run.trainer(max_train_steps=9) as trainer:
        kinds = [next(trainer.data.batches(start=index)).is_regularisation for index in range(8)]
    rows = run.log()
    assert [row["prior_loss"] is not None for row in rows] == kinds
    assert {True, False} == set(kinds)
    for row in rows:
        assert row["prior_loss"] in (None, row["loss"])


@pytest.mark.parametrize("before", ["", ON_CPU_TOO], ids=["replicated", "sharded"])
def test_two_processes_keep_to_the_base_as_one_does(tmp_path: Path, before: str) -> None:
    keys: dict[str, Any] = {
        "lr_scheduler": "constant",
        "optimizer_config": "eps=1e-3",
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
    }
    two = train(with_class(tmp_path / "two"), num_processes=2, before=before, train_batch_size=1, **keys)
    one = train(with_class(tmp_path / "one"), num_processes=1, train_batch_size=2, **keys)
    assert any(row["prior_loss"] for row in one.log())
    expected = tensors(one, "end-0")
    for rank in (0, 1):
        for key, tensor in tensors(two, f"end-{rank}").items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-7)
    for name in ("loss", "prior_loss"):
        losses = [[row[name] for row in each.log()] for each in (two, one)]
        assert [loss is None for loss in losses[0]] == [loss is None for loss in losses[1]]
        known = [[loss for loss in each if loss is not None] for each in losses]
        assert known[0] == pytest.approx(known[1], rel=1e-5, abs=1e-9)
