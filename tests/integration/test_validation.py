"""Validation pictures on the tiny SDXL model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.reporting.html_report.folder import read_run
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.tiny_runs import TinyRun
from tests.unit.models.tiny_clip import save_tiny_clip

pytestmark = pytest.mark.usefixtures("shared_caches")

PICTURES = {
    "validation_disable": False,
    "validation_prompt": "a cat on a sofa",
    "validation_resolution": "64",
    "validation_num_inference_steps": 2,
    "validation_guidance": 3.0,
    "validation_step_interval": 2,
}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path, keys=PICTURES)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def give_effect(trainer: Trainer) -> None:
    with torch.no_grad():
        for parameter in trainer.trainable.parameters():
            parameter += 0.2


def pictures_of(run: TinyRun, step: int) -> dict[str, np.ndarray]:
    folder = run.output_dir / "validation" / f"step-{step}"
    return {file.name: pixels(file) for file in sorted(folder.glob("*.png")) if file.name != "grid.png"}


def test_run_makes_base_pictures_once_and_a_grid_at_every_interval_and_the_end(run: TinyRun) -> None:
    run.run(max_train_steps=3)
    folder = run.output_dir / "validation"
    assert sorted(path.name for path in folder.iterdir()) == ["base", "step-2", "step-3"]
    assert len(list((folder / "base").glob("*.png"))) == 1
    assert (folder / "step-3" / "grid.png").is_file()


def test_scores_of_a_validation_go_to_its_folder_the_trackers_and_the_report(
    run: TinyRun, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clip = save_tiny_clip(tmp_path / "clip")
    run.run(
        max_train_steps=3,
        evaluation_type="clip",
        pretrained_evaluation_model_name_or_path=str(clip),
        num_validation_images=2,
        report_to="tensorboard",
    )
    means = {}
    for step in (2, 3):
        folder = run.output_dir / "validation" / f"step-{step}"
        scores = json.loads((folder / "scores.json").read_text())["clip_score"]
        assert scores.keys() == {Path(name).stem for name in pictures_of(run, step)}
        means[step] = sum(scores.values()) / 2
    events = EventAccumulator(str(run.output_dir / "tensorboard")).Reload()
    points = {event.step: event.value for event in events.Scalars("validation/clip_score")}
    assert points == pytest.approx(means)
    assert read_run(run.output_dir).clip_scores == pytest.approx(means)
    assert "CLIP score" in (run.output_dir / "report.html").read_text()


def test_missing_model_of_the_scores_ends_the_run_before_it_loads_weights(run: TinyRun) -> None:
    with pytest.raises(ModelError, match="pretrained_evaluation_model_name_or_path"):
        run.run(evaluation_type="clip", pretrained_evaluation_model_name_or_path="nobody/nothing")


def test_finished_run_needs_no_model_for_its_scores(run: TinyRun) -> None:
    assert run.run(max_train_steps=1, validation_disable=True) == 0
    keys = {"evaluation_type": "clip", "pretrained_evaluation_model_name_or_path": "nobody/nothing"}
    assert run.run(max_train_steps=1, **keys) == 0


def test_every_prompt_size_and_seed_has_its_picture(run: TinyRun) -> None:
    library = run.folder / "prompts.json"
    library.write_text(json.dumps({"a/../b": "one", "two": {"prompt": "two", "adapter_strength": 0.5}}))
    run.run(
        max_train_steps=1,
        user_prompt_library=str(library),
        validation_resolution="64x64,128x64",
        num_validation_images=2,
        validation_seed=5,
    )
    made = pictures_of(run, 1)
    assert len(made) == 3 * 2 * 2  # all of them in the step's folder, whatever a prompt is named
    assert sum("128x64" in name for name in made) == 6
    assert sum("seed6" in name for name in made) == 6
    assert {picture.shape for picture in made.values()} == {(64, 64, 3), (64, 128, 3)}


def test_untrained_adapter_gives_the_base_picture_and_a_trained_one_another(run: TinyRun) -> None:
    with run.trainer() as trainer:
        trainer.validation.start(0)
        trainer.validation.run(0)
        give_effect(trainer)
        trainer.validation.run(1)
    base = pixels(next((run.output_dir / "validation" / "base").glob("*.png")))
    (untrained,), (trained,) = (pictures_of(run, step).values() for step in (0, 1))
    np.testing.assert_array_equal(untrained, base)
    assert np.abs(trained - base).max() > 2


@pytest.mark.parametrize("key", ["validation_lycoris_strength", "adapter_strength"])
def test_strength_zero_gives_the_base_picture_of_a_trained_adapter(run: TinyRun, key: str) -> None:
    library = run.folder / "prompts.json"
    prompt = {"prompt": "a dog"} | ({key: 0.0} if key == "adapter_strength" else {})
    library.write_text(json.dumps({"dog": prompt}))
    keys = {"validation_prompt": None, "user_prompt_library": str(library)}
    if key != "adapter_strength":
        keys[key] = 0.0
    with run.trainer(**keys) as trainer:
        give_effect(trainer)
        trainer.validation.start(0)
        trainer.validation.run(1)
    base = pixels(next((run.output_dir / "validation" / "base").glob("*.png")))
    (strengthless,) = pictures_of(run, 1).values()
    np.testing.assert_array_equal(strengthless, base)


def test_same_step_gives_the_same_pictures_again(run: TinyRun) -> None:
    with run.trainer() as trainer:
        give_effect(trainer)
        for step in (1, 2):
            trainer.validation.run(step)
    (first,), (second,) = (pictures_of(run, step).values() for step in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_base_pictures_are_kept_until_a_setting_changes(run: TinyRun) -> None:
    with run.trainer() as trainer:
        trainer.validation.start(0)
    (file,) = (run.output_dir / "validation" / "base").glob("*.png")
    made_at = file.stat().st_mtime_ns
    with run.trainer() as trainer:
        trainer.validation.start(0)
    assert file.stat().st_mtime_ns == made_at
    with run.trainer(validation_guidance=5.0) as trainer:
        trainer.validation.start(0)
    assert len(list((run.output_dir / "validation" / "base").glob("*.png"))) == 2


def test_benchmark_can_be_left_out(run: TinyRun) -> None:
    run.run(max_train_steps=1, disable_benchmark=True)
    assert not (run.output_dir / "validation" / "base").exists()
    assert (run.output_dir / "validation" / "step-1" / "grid.png").is_file()


def test_validation_changes_nothing_that_training_sees(tmp_path: Path) -> None:
    digests = []
    for disabled in (True, False):
        run = TinyRun(tmp_path / str(disabled), keys=PICTURES)
        with run.trainer(validation_disable=disabled, validation_step_interval=1) as trainer:
            trainer.run()
            digests.append(trainer.state_digest())
            assert trainer.denoiser.training
    assert digests[0] == digests[1]


def test_setup_pipeline_copies_the_rank_schedule_and_clean_pipeline_removes_it(run: TinyRun) -> None:
    with run.trainer() as trainer:
        validation = trainer.validation
        validation.setup_pipeline("intermediary")
        pipeline = validation.pipeline
        assert pipeline._tlora_config == trainer.accelerator._tlora_config
        assert pipeline._tlora_config is not trainer.accelerator._tlora_config
        assert pipeline.unet is validation.denoiser
        validation.clean_pipeline()
        assert pipeline._tlora_config is None
        assert validation.pipeline is None
        assert trainer.family._vae is None


def test_setup_pipeline_without_a_rank_schedule_sets_none(run: TinyRun) -> None:
    with run.trainer(lora_type="standard") as trainer:
        trainer.validation.setup_pipeline("final")
        assert trainer.validation.pipeline._tlora_config is None
        trainer.validation.clean_pipeline()


def test_every_denoising_step_of_a_validation_is_masked_for_its_timestep(run: TinyRun) -> None:
    timesteps: list[int] = []
    open_ranks: list[int] = []
    with run.trainer(validation_num_inference_steps=4, disable_benchmark=True) as trainer:

        def note_ranks(module: torch.nn.Module, args: object) -> None:
            current = mask.current_mask(trainer.trainable.group, 8)
            assert current is not None
            assert not module.training
            open_ranks.append(int(current.sum()))

        trainer.denoiser.register_forward_pre_hook(lambda _, args: timesteps.append(int(args[1])))
        # The pipeline opens the mask as the denoiser is called, so it is looked at one layer inside.
        trainer.denoiser.conv_in.register_forward_pre_hook(note_ranks)
        trainer.validation.run(1)
        assert mask.current_mask(trainer.trainable.group, 8) is None
    assert len(timesteps) == 4
    assert open_ranks == [int((1000 - t) / 1000 * 6) + 2 for t in timesteps]


@pytest.mark.parametrize("where", ["make_pipeline", "pipeline_inputs"])
def test_validation_that_fails_is_reported_and_the_run_goes_on(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with run.trainer() as trainer:
        monkeypatch.setattr(trainer.family, where, fail)
        assert trainer.run() == 0
        assert trainer.denoiser.training
    lost = [each for each in caplog.messages if "RuntimeError: out of memory" in each]
    assert any("base-model" in each for each in lost)
    assert any("step 2:" in each for each in lost)
    assert (run.output_dir / "pytorch_lora_weights.safetensors").is_file()


def test_pictures_that_a_restart_finds_missing_are_made(run: TinyRun) -> None:
    run.run(max_train_steps=2)
    grid = run.output_dir / "validation" / "step-2" / "grid.png"
    grid.unlink()
    run.run(max_train_steps=3)
    assert grid.is_file()


def test_each_picture_is_shown_with_its_number_and_those_left_are_counted(run: TinyRun) -> None:
    with run.trainer(max_train_steps=5, validation_step_interval=2) as trainer:
        shown: list[tuple[int, int]] = []

        def note(number: int, total: int) -> nullcontext[None]:
            shown.append((number, total))
            return nullcontext()

        validation = trainer.validation
        validation.sampler = replace(validation.sampler, progress=note)
        number = len(validation.sampler.prompts)
        validation.start(0)
        validation.run(2)
        assert shown == [(each, number) for each in range(1, number + 1)] * 2
        left = [validation.images_left(step, max_steps=5) // number for step in range(6)]
        assert left == [3, 3, 2, 2, 1, 1]
        assert validation.images_left(2, max_steps=4) == number  # the one of step 4 is the final one


def test_images_are_due_at_the_ends_of_epochs_beside_the_steps(run: TinyRun) -> None:
    keys = {"gradient_accumulation_steps": 2, "validation_step_interval": 4, "validation_epoch_interval": 2}
    with run.trainer(max_train_steps=9, **keys) as trainer:
        validation, number = trainer.validation, len(trainer.validation.sampler.prompts)
        assert trainer.data.batches_per_epoch == 3
        assert [step for step in range(10) if validation.is_due(step)] == [3, 4, 6, 8, 9]
        left = [validation.images_left(step, max_steps=9) // number for step in range(10)]
        assert left == [5, 5, 5, 4, 3, 3, 2, 2, 1, 1]


def test_tracker_is_given_the_pictures(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    with run.trainer(max_train_steps=1) as trainer:
        keep: Callable[..., None] = lambda _, pictures: given.append(sorted(pictures))  # noqa: E731
        monkeypatch.setattr(trainer.trackers, "log_images", keep)
        trainer.run()
    assert len(given) == 1
    assert "grid" in given[0]
    assert len(given[0]) == 2
