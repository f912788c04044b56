"""The loss of held-out images on the tiny models: what it is, and that training does not notice it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.contracts import Batch, TextEmbeds
from simpletuner.helpers.errors import CacheEntryError
from simpletuner.helpers.io.run_folder import SUMMARY_FILE, checkpoint_folders
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.training import evaluation
from simpletuner.helpers.training import trainer as training_loop
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.family_runs import FLUX, KLEIN
from tests.integration.processes import start_ranks, wait_for_all
from tests.integration.tiny_runs import TinyRun

KEYS: dict[str, object] = {
    "eval_steps_interval": 2,
    "eval_timesteps": 3,
    "checkpoint_step_interval": 0,
    "report_to": "none",
}
MEASURED = {"seconds"}
SCRIPT = """
import sys
from pathlib import Path
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.build import build_trainer
sys.exit(build_trainer(load_config(Path(sys.argv[1]), families=registry.specs())).run())
"""


def tiny(folder: Path) -> TinyRun:
    """A run that holds out four of its seven images: two processes share 21 passes, three for each."""
    run = TinyRun(folder, num_images=7)
    files = (folder / "images").glob("*.png")
    digests = sorted(xxhash.xxh3_128_intdigest(file.read_bytes()) / 2**128 for file in files)
    run.keys |= {"eval_share": (digests[3] + digests[4]) / 2}
    return run


def evaluations(run: TinyRun) -> list[dict[str, Any]]:
    """The rows of the log, without times."""
    lines = (run.output_dir / "evaluations.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def trained(run: TinyRun, **keys: object) -> tuple[str, list[dict[str, Any]]]:
    """The digest of the state at the end of a run, and its log."""
    with run.trainer(**KEYS | keys) as trainer:
        assert trainer.run() == 0
        return trainer.state_digest(), run.log()


def by_hand(trainer: Trainer, *, number: int = 3) -> tuple[float, float]:
    """The losses of held-out and of training images, one noise level at a time."""
    evaluation = trainer.evaluation
    losses = []
    for image in evaluation._images:
        item = trainer.data.evaluated_item(image, index=mix(7, "evaluation", image.digest, 0))
        for level in range(number):
            batch = Batch(
                latents=item.latents[None],
                text=TextEmbeds.stack([item.text]),
                samples=(item.sample,),
                sample_indices=(mix(7, "evaluation", image.digest, level),),
            )
            shares = [(level + 0.5) / number]
            noisy = trainer.family.add_noise(
                batch.latents, sample_indices=batch.sample_indices, seed=7, shares=shares
            )
            with torch.no_grad(), trainer.trainable.rank_mask_for(noisy.timesteps):
                prediction = trainer.family.predict(trainer.denoiser, noisy, batch)
            losses.append(float(((prediction - noisy.target) ** 2).mean()))
    first = evaluation._num_held_out * number
    return sum(losses[:first]) / first, sum(losses[first:]) / (len(losses) - first)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, str, list[dict[str, Any]]]:
    """A run of five steps with evaluations, its state and its log."""
    run = tiny(tmp_path_factory.mktemp("plain"))
    return run, *trained(run, max_train_steps=5)


def test_a_run_with_evaluations_trains_bit_for_bit_as_one_without(
    plain: tuple[TinyRun, str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    _, digest, log = plain
    assert trained(tiny(tmp_path), max_train_steps=5, eval_loss_disable=True) == (digest, log)
    assert not (tmp_path / "output" / "evaluations.jsonl").exists()


def test_it_is_evaluated_before_the_first_step_at_intervals_and_at_the_end(
    plain: tuple[TinyRun, str, list[dict[str, Any]]],
) -> None:
    run, *_ = plain
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert len({row["eval_loss"] for row in rows}) == 4, "the adapter changes from row to row"
    assert {(row["images"], row["train_images"]) for row in rows} == {(4, 3)}
    assert len({row["image_set"] for row in rows}) == 1
    summary = json.loads((run.output_dir / SUMMARY_FILE).read_bytes())
    lowest = min(rows, key=lambda row: row["eval_loss"])
    assert summary["held_out"].startswith(f"lowest loss {lowest['eval_loss']:.5f} at step {lowest['step']} ")
    assert "Loss of held-out images" in (run.output_dir / "report.html").read_text()


@pytest.mark.parametrize("model", [None, FLUX, KLEIN], ids=["sdxl", "flux", "flux2"])
def test_the_losses_are_those_of_training_at_fixed_noise(model: Any, tmp_path: Path) -> None:
    run = tiny(tmp_path)
    if model is not None:
        run.lycoris = model.tlora
        run.keys |= {"model_family": model.family, "pretrained_model_name_or_path": str(model.folder())}
    with run.trainer(**KEYS, max_train_steps=1, train_batch_size=2) as trainer:
        for parameter in trainer.trainable.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        expected = by_hand(trainer)
        with trainer.trackers:
            trainer.evaluation.run(0)
        (row,) = evaluations(run)
        assert (row["eval_loss"], row["eval_train_loss"]) == pytest.approx(expected, rel=1e-5)
        assert trainer.denoiser.training


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(
    plain: tuple[TinyRun, str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    whole, digest, _ = plain
    run = tiny(tmp_path)
    trained(run, max_train_steps=5, checkpoint_step_interval=2)
    for step, folder in checkpoint_folders(run.output_dir):
        if step > 2:
            (folder / "manifest.json").unlink()
    lines = (run.output_dir / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (run.output_dir / "evaluations.jsonl").write_text(lines[0])  # the one of step 2 was interrupted
    assert trained(run, max_train_steps=5, checkpoint_step_interval=2)[0] == digest
    assert evaluations(run) == evaluations(whole)


def test_an_evaluation_of_the_resumed_step_is_not_repeated(
    plain: tuple[TinyRun, str, list[dict[str, Any]]],
) -> None:
    run, *_ = plain
    before = evaluations(run)
    with run.trainer(**{**KEYS, "max_train_steps": 6, "eval_steps_interval": 5}) as trainer:
        assert trainer.evaluation.is_due(trainer.progress.step)
        with trainer.trackers:
            trainer.evaluation.start(trainer.progress.step)
    assert evaluations(run) == before


def test_two_processes_measure_what_one_measures(
    plain: tuple[TinyRun, str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tiny(tmp_path)
    run.config(**KEYS, max_train_steps=1)
    script = run.folder / "script.py"
    script.write_text(SCRIPT)
    wait_for_all(start_ranks(script, run.folder / "config.json"))
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 1]
    one = evaluations(plain[0])[0]
    assert rows[0].keys() == one.keys()
    for name, value in one.items():
        assert rows[0][name] == pytest.approx(value, rel=1e-6), name


def test_the_average_is_evaluated_where_validation_shows_that_alone(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    keys = {"use_ema": True, "ema_validation": "ema_only", "eval_steps_interval": 0}
    with run.trainer(**KEYS | keys, max_train_steps=3, learning_rate=0.1) as trainer:
        assert trainer.run() == 0
        ema = trainer.state.ema
        assert ema is not None
        with ema.weights():
            expected = by_hand(trainer)
        as_trained = by_hand(trainer)
    found = evaluations(run)[-1]["eval_loss"], evaluations(run)[-1]["eval_train_loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(as_trained, rel=1e-5)


def test_a_damaged_entry_is_left_out_and_named(
    plain: tuple[TinyRun, str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tiny(tmp_path)
    with run.trainer(**KEYS, max_train_steps=1) as trainer:
        whole = trainer.data.evaluated_item
        broken = trainer.evaluation._images[0]

        def item(image: Any, *, index: int) -> Any:
            if image is broken:
                raise CacheEntryError("This entry is damaged.")
            return whole(image, index=index)

        monkeypatch.setattr(trainer.data, "evaluated_item", item)
        with trainer.trackers:
            trainer.evaluation.run(0)
    (row,) = evaluations(run)
    assert (row["images"], row["train_images"]) == (3, 3)
    assert row["image_set"] != evaluations(plain[0])[0]["image_set"], "the losses are not compared"
    assert "This entry is damaged. Until then it is not evaluated." in caplog.text
    assert f"left out, without a finite loss: {broken.sample.path}" in caplog.text


def test_an_image_that_proves_damaged_on_demand_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny(tmp_path)
    with run.trainer(**KEYS, max_train_steps=2, vae_cache_ondemand=True) as trainer:
        image = trainer.evaluation._images[0]
        trainer.data.damaged[image.digest] = "it is torn"
        assert trainer.run() == 0
    assert caplog.text.count(f"{image.sample.path} cannot be used: it is torn. Replace or remove it.") == 1
    assert [row["images"] for row in evaluations(run)] == [3, 3]


def test_a_stop_signal_leaves_an_evaluation_to_the_resumed_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny(tmp_path)
    with run.trainer(**KEYS, max_train_steps=1) as trainer, trainer.trackers:
        trainer.preemption.requested = True
        with caplog.at_level("INFO"):
            trainer.evaluation.run(0)
        assert evaluations(run) == []
        assert "evaluation of step 0 will be made on resume" in caplog.text
        trainer.preemption.requested = False
        trainer.evaluation.run(0)
    assert [row["step"] for row in evaluations(run)] == [0]


@pytest.mark.parametrize("arrives", ["during the evaluation", "after it"])
def test_a_signal_to_another_process_ends_this_one_after_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: str
) -> None:
    run = tiny(tmp_path)
    with run.trainer(**KEYS, max_train_steps=1) as trainer:

        def signalled(*_: object, **__: object) -> bool:
            return trainer.progress.step == 1

        if arrives == "during the evaluation":
            monkeypatch.setattr(evaluation, "in_any_process", signalled)
        monkeypatch.setattr(training_loop, "in_any_process", signalled)
        assert trainer.run() == EXIT_PREEMPTED
    assert not (run.output_dir / SUMMARY_FILE).exists()
    assert len(evaluations(run)) == (1 if arrives == "during the evaluation" else 2)


def test_keys_of_the_configuration_decide_what_is_evaluated_and_when(tmp_path: Path) -> None:
    run, others = tiny(tmp_path), tmp_path / "others"
    others.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(others / f"{index}.png")
    pictures = {"id": "pictures", "instance_data_dir": str(tmp_path / "images")}
    held_out = {"id": "others", "instance_data_dir": str(others), "dataset_type": "eval"}
    keys = {
        "data_backend_config": [pictures, held_out],
        "eval_dataset_id": "others",
        "num_eval_images": 2,
        "eval_steps_interval": 0,
        "eval_epoch_interval": 1,
        "train_batch_size": 2,
    }
    with run.trainer(**KEYS | keys, max_train_steps=6) as trainer:
        evaluated = [image.sample.dataset_id for image in trainer.evaluation._images]
        assert evaluated == ["others", "others", "pictures", "pictures"]
        # 3 images are trained, in batches of 2.
        assert [step for step in range(1, 7) if trainer.evaluation.is_due(step)] == [2, 4, 6]
        passes = [job for _, job in trainer.evaluation._rounds()]
        assert passes == [(index, part) for index in range(4) for part in ((0, 1), (2,))]
    keys["data_backend_config"] = [pictures, held_out | {"train_batch_size": 1}]
    with run.trainer(**KEYS | keys, max_train_steps=6) as trainer:
        sizes = [(index, len(part)) for _, (index, part) in trainer.evaluation._rounds()]
        assert sizes == [(0, 1)] * 3 + [(1, 1)] * 3 + [(2, 2), (2, 1), (3, 2), (3, 1)]


def test_captions_are_encoded_by_the_text_encoders_that_are_trained(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    keys = {
        "train_text_encoder": True,
        "text_encoder_lr": "1e-2",
        "lora_type": "standard",
        "lora_dropout": 0.5,
    }
    standard = {"lora_rank": 4, "lora_alpha": 8, "lycoris_config": None}
    with run.trainer(**KEYS, **keys, **standard, max_train_steps=2) as trainer:
        assert trainer.run() == 0
        encoders = trainer.family.text_encoders.values()
        assert all(encoder.training for encoder in encoders)
        trainer.evaluation._evaluated.clear()
        trainer.evaluation.run(2)
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 2, 2]
    assert rows[1] == rows[2], "dropout is off"
    assert rows[0]["eval_loss"] != rows[1]["eval_loss"]


def test_masks_weight_the_loss_of_evaluated_images(tmp_path: Path) -> None:
    run, masks = tiny(tmp_path), tmp_path / "masks"
    masks.mkdir()
    for file in (tmp_path / "images").glob("*.png"):
        Image.new("RGB", (64, 64), (128, 128, 128)).save(masks / file.name)
    pictures = {"id": "pictures", "instance_data_dir": str(tmp_path / "images"), "conditioning_data": "masks"}
    entry = {"id": "masks", "instance_data_dir": str(masks), "conditioning_type": "mask"}
    with run.trainer(**KEYS, max_train_steps=1, data_backend_config=[pictures, entry]) as trainer:
        expected = np.array(by_hand(trainer)) * 128 / 255
        with trainer.trackers:
            trainer.evaluation.run(0)
    (row,) = evaluations(run)
    assert (row["eval_loss"], row["eval_train_loss"]) == pytest.approx(tuple(expected), rel=1e-4)
