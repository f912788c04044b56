"""The training loop on the tiny SDXL model, from the user's files to the finished adapter."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import safe_open

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.choices.algorithms import ALGORITHMS as RECORDS
from simpletuner.helpers.contracts import Batch
from simpletuner.helpers.errors import ConfigError, TrainingError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.training import device, preparing
from simpletuner.helpers.training.trainer import MAX_SKIPPED_STEPS, Trainer
from simpletuner.lycoris_defaults import default_lycoris_config
from tests.integration.flux_pipelines import tiny_flux
from tests.integration.tiny_runs import TinyRun, gradients, tiny_model

pytestmark = pytest.mark.usefixtures("shared_caches")

ALGORITHMS = tuple(RECORDS)
MODELS = {"sdxl": tiny_model, "flux": tiny_flux}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path)


def first_batch(trainer: Trainer) -> Batch:
    return next(trainer.data.batches()).to(trainer.accelerator.device)


def move_away_from_zero(trainer: Trainer) -> None:
    """Give the adapter an effect, so that a wrong rank shows in the gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trainable.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_run_ends_with_everything_it_promises(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        code = run.run(
            validation_disable=False,
            validation_prompt="a cat",
            validation_resolution="64",
            validation_num_inference_steps=2,
            validation_step_interval=2,
        )
    assert code == 0
    output = run.output_dir
    for name in (
        "pytorch_lora_weights.safetensors",
        "config.resolved.json",
        "checkpoint-4/pytorch_lora_weights.safetensors",
        "checkpoint-4/config.resolved.json",
        "validation/step-2/grid.png",
        "validation/step-4/grid.png",
    ):
        assert (output / name).is_file(), name
    assert str(output / "pytorch_lora_weights.safetensors") in caplog.text
    assert str(output / "validation/step-4/grid.png") in caplog.text
    assert [line["step"] for line in run.log()] == [1, 2, 3, 4]
    assert all(2 <= line["mean_active_rank"] <= 8 for line in run.log())


def test_every_training_step_opens_the_ranks_of_the_timesteps_that_the_denoiser_gets(
    run: TinyRun,
) -> None:
    given: list[list[int]] = []
    opened: list[list[int]] = []
    with run.trainer(train_batch_size=3, max_train_steps=2) as trainer:
        unet = trainer.accelerator.unwrap_model(trainer.denoiser)
        unet.register_forward_pre_hook(lambda _, args: given.append(args[1].tolist()))

        def note_ranks(*_: object) -> None:
            current = mask.current_mask(trainer.trainable.group, 8)
            assert current is not None
            opened.append(current.sum(dim=1).int().tolist())

        unet.conv_in.register_forward_pre_hook(note_ranks)
        for batch in (first_batch(trainer), replace(first_batch(trainer), sample_indices=(7, 8, 9))):
            trainer.train_step(batch)
    assert len({timestep for step in given for timestep in step}) > 3
    assert opened == [[int((1000 - t) / 1000 * 6) + 2 for t in step] for step in given]


def test_adapter_file_tells_what_it_was_trained_on(run: TinyRun) -> None:
    run.run(max_train_steps=1)
    with safe_open(run.output_dir / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["steps"] == "1"
    assert metadata["seed"] == "7"
    assert json.loads(metadata["datasets"]) == {"pictures": 3}
    assert metadata["model_family"] == "sdxl"
    assert json.loads(metadata["tlora_config"])["max_rank"] == 8


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_default_of_every_algorithm_trains_on_the_same_path(tmp_path: Path, family: str, algo: str) -> None:
    lycoris = default_lycoris_config(algo)
    if algo == "tlora":  # no layer of the tiny models takes rank 64
        lycoris |= {"linear_dim": 8, "linear_alpha": 8.0, "tlora_min_rank": 2}
    if algo == "tlokr":  # whose larger factors are 8 wide there
        lycoris |= {"linear_dim": 3, "linear_alpha": 3.0, "tlora_min_rank": 1}
    run = TinyRun(tmp_path, lycoris=lycoris)
    keys = {"model_family": family, "pretrained_model_name_or_path": str(MODELS[family]())}
    assert run.run(max_train_steps=2, **keys) == 0
    assert [line["mean_active_rank"] is None for line in run.log()] == [
        not RECORDS[algo].has_rank_schedule
    ] * 2


def test_algorithm_that_cannot_be_made_for_a_layer_is_a_configuration_error(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, lycoris=default_lycoris_config("tlora"))
    with (
        pytest.raises(ConfigError, match=r"rank 64 .* 32x32 .*linear_dim to 32"),
        run.trainer(),
    ):
        pass


def test_standard_lora_trains_on_the_same_path(run: TinyRun) -> None:
    assert run.run(lora_type="standard", lora_rank=4, lora_dropout=0.1, max_train_steps=2) == 0
    assert (run.output_dir / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_loss_falls_when_one_batch_is_trained_again_and_again(run: TinyRun, precision: str) -> None:
    with run.trainer(mixed_precision=precision, learning_rate=1e-2, lr_scheduler="constant") as trainer:
        batch = first_batch(trainer)
        losses = []
        for _ in range(6):
            losses.append(trainer.optimizer_step(iter([batch])).loss)
    assert losses[-1] < losses[0]


def test_accelerator_tells_the_rank_schedule_and_the_network(run: TinyRun) -> None:
    with run.trainer() as trainer:
        config = trainer.accelerator._tlora_config
        assert trainer.accelerator._tlora_active is True
        assert (config["max_rank"], config["min_rank"], config["alpha"]) == (8, 2, 1.0)
        assert trainer.accelerator._lycoris_wrapped_network is trainer.trainable.lycoris_network
    with run.trainer(lora_type="standard") as trainer:
        assert trainer.accelerator._tlora_active is False
        assert trainer.accelerator._lycoris_wrapped_network is None


def test_prepared_denoiser_contains_exactly_the_adapter_as_trainable(run: TinyRun) -> None:
    with run.trainer() as trainer:
        inside = {id(p) for p in trainer.denoiser.parameters() if p.requires_grad}
        assert inside == {id(p) for p in trainer.trainable.parameters()}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.reliability_row(10)
def test_gradients_with_checkpointing_equal_those_without(tmp_path: Path, batch_size: int) -> None:
    run, found = TinyRun(tmp_path), []
    for checkpointing in (True, False):
        with run.trainer(gradient_checkpointing=checkpointing, train_batch_size=batch_size) as trainer:
            move_away_from_zero(trainer)
            trainer.train_step(first_batch(trainer))
            found.append(gradients(trainer))
    assert sum(gradient.abs().sum() for gradient in found[1]) > 0
    for with_checkpointing, without in zip(*found, strict=True):
        torch.testing.assert_close(with_checkpointing, without, rtol=0, atol=1e-6)


@pytest.mark.reliability_row(10)
def test_gradient_of_a_batch_is_the_mean_of_its_samples(run: TinyRun) -> None:
    with run.trainer(train_batch_size=3) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer)
        assert len(set(trainer.train_step(batch).timesteps)) == 3  # mixed ranks in one batch
        together = gradients(trainer)
        for index in range(3):
            trainer.train_step(one_sample(batch, index))
        alone = gradients(trainer)
    for whole, summed in zip(together, alone, strict=True):
        torch.testing.assert_close(whole, summed / 3, rtol=1e-4, atol=1e-6)


def one_sample(batch: Batch, index: int) -> Batch:
    rows = slice(index, index + 1)
    assert batch.text.pooled is not None
    text = replace(batch.text, prompt_embeds=batch.text.prompt_embeds[rows], pooled=batch.text.pooled[rows])
    return replace(
        batch,
        latents=batch.latents[rows],
        text=text,
        samples=batch.samples[rows],
        sample_indices=batch.sample_indices[rows],
    )


def test_accumulated_gradients_equal_those_of_one_large_batch(run: TinyRun) -> None:
    with run.trainer(train_batch_size=2, gradient_accumulation_steps=2) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer)
        with trainer.accelerator.accumulate(trainer.denoiser):
            trainer.train_step(batch)
        whole = gradients(trainer)
        for index in (0, 1):
            with trainer.accelerator.accumulate(trainer.denoiser):
                trainer.train_step(one_sample(batch, index))
        accumulated = gradients(trainer)
    for one, other in zip(whole, accumulated, strict=True):
        # Each backward is divided by the number of accumulated ones, so one of the two is half the sum.
        torch.testing.assert_close(2 * one, other, rtol=1e-4, atol=1e-6)


def test_train_step_gives_the_same_loss_whatever_was_drawn_before(run: TinyRun) -> None:
    with run.trainer(lora_type="standard", lora_dropout=0.5, lora_rank=4) as trainer:
        move_away_from_zero(trainer)
        batch = first_batch(trainer)
        first = trainer.train_step(batch).loss
        torch.rand(5)
        assert trainer.train_step(batch).loss == first


@pytest.mark.reliability_row(10)
def test_mask_is_closed_after_a_step_that_raises(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.trainer() as trainer:
        batch = first_batch(trainer)

        def broken(loss: torch.Tensor) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(trainer.accelerator, "backward", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                trainer.train_step(batch)
        assert mask.current_mask(trainer.trainable.group, 8) is None
        trainer.train_step(batch)  # a mask that was still held would raise


@pytest.mark.reliability_row(12)
def test_latent_that_is_not_finite_stops_the_run_before_a_step(run: TinyRun) -> None:
    with run.trainer() as trainer:
        batch = first_batch(trainer)
        before = trainer.state_digest()
        trainer.train_step(replace(batch, latents=batch.latents * float("nan")))
        sample = batch.samples[0].path
        with pytest.raises(TrainingError, match=rf"Step 1: the loss is nan.*pictures/{sample} at timestep"):
            trainer.apply_gradients()
        assert trainer.state_digest() == before


def test_clipping_by_norm_bounds_the_whole_gradient(run: TinyRun) -> None:
    with run.trainer(max_grad_norm=1e-3) as trainer:
        move_away_from_zero(trainer)
        trainer.train_step(first_batch(trainer))
        before = trainer._clip()
        after = torch.nn.utils.get_total_norm([p.grad for p in trainer.trainable.parameters()])
    assert before > 1e-3
    torch.testing.assert_close(after, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_clipping_by_value_bounds_each_entry(run: TinyRun) -> None:
    with run.trainer(max_grad_norm=1e-4, grad_clip_method="value") as trainer:
        move_away_from_zero(trainer)
        trainer.train_step(first_batch(trainer))
        assert trainer._clip() > 1e-4
        assert max(p.grad.abs().max() for p in trainer.trainable.parameters()) == pytest.approx(1e-4)


def test_learning_rate_moves_once_per_optimiser_step_and_is_logged(run: TinyRun) -> None:
    run.run(gradient_accumulation_steps=2, max_train_steps=4, lr_warmup_steps=2, lr_scheduler="linear")
    assert [line["lr"] for line in run.log()] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert [line["samples"] for line in run.log()] == [2, 4, 6, 8]
    assert [line["epoch"] for line in run.log()] == [0, 1, 1, 2]  # 3 images


def test_epochs_decide_the_length_when_no_steps_are_given(run: TinyRun) -> None:
    run.run(max_train_steps=0, num_train_epochs=2, gradient_accumulation_steps=2)
    assert run.log()[-1]["step"] == 3  # 2 epochs of 3 images, 2 images a step


def test_fp16_on_a_device_that_cannot_is_a_configuration_error(run: TinyRun) -> None:
    with (
        pytest.raises(ConfigError, match="Set mixed_precision to bf16 or no"),
        run.trainer(mixed_precision="fp16"),
    ):
        pass


def test_finished_run_says_so_and_how_to_go_on(run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    assert run.run() == 0
    files = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*.safetensors")}
    with caplog.at_level(logging.INFO):
        assert run.run() == 0
    assert "This run is finished: step 4 of 4. Raise max_train_steps" in caplog.text
    assert files == {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*.safetensors")}
    assert run.run(max_train_steps=6) == 0
    assert [line["step"] for line in run.log()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.reliability_row(27)
def test_second_run_on_one_output_folder_is_refused(run: TinyRun) -> None:
    with run.trainer(), pytest.raises(StorageError, match=str(os.getpid())), run.trainer():
        pass


@pytest.mark.usefixtures("own_caches")
def test_caches_are_filled_once_and_no_encoder_stays_loaded(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        with run.trainer() as trainer:
            assert trainer.family._vae is None
            assert trainer.family._encoder is None
        assert "Encoded 3 images" in caplog.text
        caplog.clear()
        with run.trainer():
            pass
    assert "images are cached" in caplog.text


def test_overflowed_fp16_gradient_skips_the_step_and_too_many_in_a_row_end_the_run(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.trainer() as trainer:
        # What accelerate sets up on a GPU, on the CPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        unscale = functools.partial(scaler.unscale_, trainer.state.optimizer)
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
        monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscale)
        trainer.optimizer = AcceleratedOptimizer(trainer.state.optimizer, scaler=scaler)
        batch = first_batch(trainer)
        before = [parameter.detach().clone() for parameter in trainer.trainable.parameters()]

        def step() -> bool:
            """One optimiser step; whether the weights moved."""
            trainer.optimizer_step(iter([batch]))
            return any(
                not torch.equal(old, new)
                for old, new in zip(before, trainer.trainable.parameters(), strict=True)
            )

        overflow = trainer.trainable.parameters()[0].register_hook(lambda gradient: gradient + math.inf)
        assert not step()
        assert (trainer.skipped_steps, scaler.get_scale()) == (1, 1.0)
        overflow.remove()
        assert step()
        assert trainer.skipped_steps == 0
        trainer.skipped_steps = MAX_SKIPPED_STEPS
        trainer.trainable.parameters()[0].register_hook(lambda gradient: gradient + math.inf)
        with pytest.raises(TrainingError, match=r"overflowed 26 times in a row\. Use mixed_precision bf16"):
            step()


def test_run_that_fails_gives_the_folder_and_the_trackers_back(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    with run.trainer() as trainer:
        monkeypatch.setattr(trainer.trackers, "finish", lambda: closed.append(True))
        nowhere = torch.full((1,), float("nan"))
        then = trainer.family.predict
        monkeypatch.setattr(trainer.family, "predict", lambda *args: then(*args) * nowhere)
        with pytest.raises(TrainingError, match="Step 1"):
            trainer.run()
    assert closed == [True]
    assert run.run() == 0


@pytest.mark.parametrize("is_known_before", [True, False])
def test_large_denoiser_is_refused_on_the_cpu_before_and_after_its_size_is_known(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, is_known_before: bool
) -> None:
    """The size of a repository that no family lists is known once it is downloaded."""
    monkeypatch.setattr(device, "LARGEST_ON_CPU", 1000)
    monkeypatch.setattr(preparing, "num_denoiser_weights", lambda *_: 1001 if is_known_before else None)
    with pytest.raises(ConfigError, match="allow_cpu"):
        run.run()
    assert run.run(allow_cpu=True, max_train_steps=1) == 0
