"""A run that was interrupted ends bit-identical to one that was not."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.faults import at_crash_points
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl
from simpletuner.helpers.sampling.validation_sampler import ValidationSampler
from tests.integration.processes import wait_for_all
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TLORA, TinyRun, start, start_pair, wait_for_steps

pytestmark = pytest.mark.usefixtures("shared_caches")

YEAR_S = 365 * 24 * 3600


class Killed(BaseException):
    """Stands for the end of the process."""


def digest_after(run: TinyRun, steps: int, **keys: object) -> str:
    """Train to `steps`, resuming whatever is there, and take the digest of the end."""
    with run.trainer(max_train_steps=steps, lr_scheduler="constant_with_warmup", **keys) as trainer:
        trainer.run()
        return trainer.state_digest()


@functools.cache
def _whole(keys: tuple[tuple[str, object], ...]) -> tuple[TinyRun, str]:
    run = TinyRun(Path(tempfile.mkdtemp(prefix="whole_")))
    return run, digest_after(run, 6, **dict(keys))


def whole_run(**keys: object) -> tuple[TinyRun, str]:
    """Six steps that nothing interrupts, trained once per process, and the digest of their end."""
    return _whole(tuple(keys.items()))


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path / "interrupted")


@pytest.mark.parametrize(
    ("stops", "keys"),
    [
        ([3], {}),
        ([1, 2, 5], {}),  # 3 images: mid-epoch, twice within an epoch
        ([3], {"gradient_accumulation_steps": 2, "train_batch_size": 2}),
        ([3], {"lora_type": "standard", "lora_dropout": 0.3, "lora_rank": 4}),
        ([3], {"optimizer": "prodigy", "learning_rate": 1.0}),
        ([3], {"optimizer": "bnb-adamw8bit", "optimizer_config": "min_8bit_size=16"}),
    ],
    ids=["once", "often", "accumulating", "dropout", "prodigy", "8-bit"],
)
@pytest.mark.reliability_row(4)
def test_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    run: TinyRun, stops: list[int], keys: dict[str, object]
) -> None:
    whole, expected = whole_run(**keys)
    for stop in stops:
        digest_after(run, stop, **keys)
    assert digest_after(run, 6, **keys) == expected
    assert run.log() == whole.log()
    ours, theirs = (load_file(each.output_dir / "pytorch_lora_weights.safetensors") for each in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.usefixtures("own_caches")
def test_what_is_encoded_on_demand_trains_as_what_was_encoded_before(
    run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = whole_run()
    keys = {"vae_cache_ondemand": True, "text_cache_ondemand": True}
    digest_after(run, 2, **keys)
    assert digest_after(run, 6, **keys) == expected
    assert run.log() == whole.log()
    monkeypatch.setattr(SDXL, "load_vae", None)
    assert digest_after(run, 7, **keys) != expected  # every entry is there


@pytest.mark.slow
@pytest.mark.usefixtures("own_caches")
def test_a_run_with_caches_off_trains_as_one_with_caches_and_writes_none(run: TinyRun) -> None:
    whole, expected = whole_run()
    keys = {"vae_cache_disable": True, "text_cache_disable": True}
    digest_after(run, 2, **keys)
    assert digest_after(run, 6, **keys) == expected
    assert run.log() == whole.log()
    assert not [*run.folder.rglob("shard-*")]


def follow_each_other(run: TinyRun) -> None:
    """Two datasets of the images: small ones for two steps, large ones from the second."""
    entry = {"instance_data_dir": str(run.folder / "images"), "resolution_type": "pixel"}
    datasets = [
        {"id": "small", "resolution": 64, "end_step": 2, **entry},
        {"id": "large", "resolution": 96, "start_step": 2, **entry},
    ]
    run.keys["data_backend_config"] = "two.json"
    (run.folder / "two.json").write_text(json.dumps(datasets))


def test_datasets_that_follow_each_other_are_resumed_in_their_place(run: TinyRun, tmp_path: Path) -> None:
    whole = TinyRun(tmp_path / "whole")
    keys = {"gradient_accumulation_steps": 2}
    for each in (run, whole):
        follow_each_other(each)
    expected = digest_after(whole, 6, **keys)
    digest_after(run, 3, **keys)
    assert digest_after(run, 6, **keys) == expected
    assert run.log() == whole.log()
    # Step 1 is small, step 2 both, the others large: epochs of 3, 6 and 3 batches, of which two are cut to 2.
    assert [row["epoch"] for row in whole.log()] == [0, 1, 2, 3, 3, 4]
    with (
        pytest.raises(CheckpointError, match=r"6 steps of the checkpoint had 12 images, another.*start_step"),
        run.trainer(max_train_steps=8, gradient_accumulation_steps=1),
    ):
        pass


def test_checkpoints_at_the_ends_of_epochs_are_the_same_after_a_resume(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    # 3 images, 2 to a step: every second epoch ends in step 3, 6, ...; step 6 is due by the steps too.
    keys = {
        "gradient_accumulation_steps": 2,
        "checkpoint_step_interval": 6,
        "checkpoint_epoch_interval": 2,
        "checkpoints_total_limit": None,
    }
    caplog.set_level(logging.INFO)
    digest_after(run, 2, **keys)
    digest_after(run, 7, **keys)
    saved = [each.args[0].name for each in caplog.records if each.msg == "Saved %s"]
    assert saved == ["checkpoint-2", "checkpoint-3", "checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize("name", ["adamw_schedulefree", "prodigyplus"])
def test_images_show_averages_and_leave_the_trained_weights(
    run: TinyRun, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"optimizer": name, "learning_rate": 1.0 if name == "prodigyplus" else 1e-2}
    keys |= {"gradient_accumulation_steps": 2}
    whole, expected = whole_run(**keys)
    shown: list[list[torch.Tensor]] = []

    def note(sampler: ValidationSampler, *args: object, **options: object) -> None:
        shown.append([weight.detach().clone() for weight in trainer.trainable.parameters()])

    monkeypatch.setattr(ValidationSampler, "generate_all", note)
    keys |= PICTURES | {"validation_step_interval": 1, "disable_benchmark": True}
    for steps in (3, 6):
        with run.trainer(max_train_steps=steps, lr_scheduler="constant_with_warmup", **keys) as trainer:
            trainer.run()
            trained = [weight.detach().clone() for weight in trainer.trainable.parameters()]
            with trainer.state.averages():
                assert all(map(torch.equal, shown[-1], trainer.trainable.parameters()))
            assert not any(map(torch.equal, shown[-1], trained))
            digest = trainer.state_digest()
    assert digest == expected
    ours, theirs = (load_file(each.output_dir / "pytorch_lora_weights.safetensors") for each in (run, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.reliability_row(6)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = whole_run()
    digest_after(run, 4)
    file = run.output_dir / "checkpoint-4" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert digest_after(run, 6) == expected
    assert "checkpoint-4" in caplog.text


@pytest.mark.reliability_row(2)
def test_run_that_dies_while_it_saves_resumes_exactly(tmp_path: Path) -> None:
    _, expected = whole_run()
    for stage in ("folder.filled", "folder.before_rename", "folder.after_rename"):
        saves = 0

        def die(name: str, stage: str = stage) -> None:
            nonlocal saves
            saves += name == stage
            if saves == 2:
                raise Killed

        folder = TinyRun(tmp_path / stage)
        with pytest.raises(Killed), at_crash_points(die):
            digest_after(folder, 6)
        assert digest_after(folder, 6) == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"linear_dim": 4, "linear_alpha": 4}, "linear_dim"),
        ({"linear_alpha": 4}, "linear_alpha"),
        ({"tlora_init": "vanilla"}, "tlora_init"),
        ({"apply_preset": {"target_module": ["FeedForward"]}}, "apply_preset"),
        ({"algo": "lora", "tlora_min_rank": 1}, "algo"),
    ],
    ids=["rank", "alpha", "init", "targets", "algorithm"],
)
@pytest.mark.reliability_row(9)
def test_resume_with_another_adapter_is_refused(run: TinyRun, change: dict[str, object], field: str) -> None:
    digest_after(run, 1)
    other = {**TLORA, **change}
    if other["algo"] != "tlora":
        del other["tlora_min_rank"]
    run.lycoris = other
    with pytest.raises(CheckpointError, match=rf"lycoris {field}\s+.* in the checkpoint"):
        digest_after(run, 2)


@pytest.mark.reliability_row(9)
def test_resume_with_another_optimiser_is_refused(run: TinyRun) -> None:
    digest_after(run, 1)
    with pytest.raises(CheckpointError, match=r"optimizer +'adamw' in the checkpoint, 'prodigy'"):
        digest_after(run, 2, optimizer="prodigy")


@pytest.mark.reliability_row(9)
def test_resume_on_another_base_model_is_refused_and_on_a_moved_one_not(tmp_path: Path, run: TinyRun) -> None:
    digest_after(run, 1)
    save_tiny_sdxl(tmp_path / "other", seed=1, depth=1)
    with pytest.raises(CheckpointError, match="base weights"):
        digest_after(run, 2, pretrained_model_name_or_path=str(tmp_path / "other"))
    save_tiny_sdxl(tmp_path / "moved", depth=1)
    digest_after(run, 2, pretrained_model_name_or_path=str(tmp_path / "moved"))


@pytest.mark.reliability_row(9)
def test_safe_settings_may_change(run: TinyRun) -> None:
    digest_after(run, 2)
    digest_after(run, 4, learning_rate=5e-4, checkpoint_step_interval=3, max_grad_norm=0.5)
    assert [line["lr"] for line in run.log()] == [5e-4, 1e-3, 5e-4, 5e-4]


def test_named_checkpoint_begins_a_second_branch(run: TinyRun) -> None:
    digest_after(run, 4)
    digest_after(run, 3, resume_from_checkpoint="checkpoint-2")
    assert [line["step"] for line in run.log()] == [1, 2, 3]


@pytest.mark.reliability_row(1)
def test_run_that_is_killed_again_and_again_ends_exactly(tmp_path: Path, run: TinyRun) -> None:
    keys = {"max_train_steps": 30, "checkpoint_step_interval": 1, "checkpoints_total_limit": 2}
    whole = TinyRun(tmp_path / "whole")
    with whole.trainer(**keys) as trainer:
        trainer.run()
        expected = trainer.state_digest()
    for steps_until_kill in (5, 17):
        process = start(run, **keys)
        wait_for_steps(run, steps_until_kill, process=process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    last = start(run, **keys)
    assert last.wait() == 0, last.errors()
    assert f"digest {expected}" in last.output()
    assert run.log() == whole.log()
    assert not list(run.output_dir.glob(".partial*"))


@pytest.mark.reliability_row(8)
def test_two_processes_go_on_where_one_stopped_and_back(tmp_path: Path, run: TinyRun) -> None:
    keys = {"checkpoint_step_interval": 0, "gradient_accumulation_steps": 2}
    whole = TinyRun(tmp_path / "whole")
    assert whole.run(**keys, max_train_steps=6, train_batch_size=2, lr_scheduler="constant") == 0
    one = {**keys, "train_batch_size": 2, "lr_scheduler": "constant"}
    two = {**keys, "train_batch_size": 1, "lr_scheduler": "constant"}
    assert run.run(**one, max_train_steps=2) == 0
    wait_for_all(start_pair(run, **two, max_train_steps=4))
    assert run.run(**one, max_train_steps=6) == 0
    for ours, theirs in zip(run.log(), whole.log(), strict=True):
        assert ours["samples"] == theirs["samples"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["mean_active_rank"] == pytest.approx(theirs["mean_active_rank"], abs=1e-6)


@pytest.mark.reliability_row(30)
def test_clock_that_runs_backwards_changes_nothing(
    tmp_path: Path, run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"checkpoint_step_interval": 1, "lr_scheduler": "constant", **PICTURES}
    whole = TinyRun(tmp_path / "whole", keys=keys)
    expected = digest_after(whole, 4)
    run.keys = keys
    digest_after(run, 2)
    os.utime(run.output_dir / "checkpoint-2", (0, 0))
    back_s = itertools.count(YEAR_S, YEAR_S)  # each look at the clock finds it a year further back
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - next(back_s))
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() - next(back_s) * 10**9)
    with run.trainer(max_train_steps=4) as trainer:
        assert trainer.progress.step == 2
        assert trainer.run() == 0
        assert trainer.state_digest() == expected
    assert run.log() == whole.log()
    lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"] > 0 for line in lines)


def test_output_folder_can_be_moved_between_two_starts(tmp_path: Path, run: TinyRun) -> None:
    digest_after(run, 2)
    moved = tmp_path / "moved"
    shutil.move(run.folder, moved)
    digest_after(TinyRun(moved), 4)
    assert [line["step"] for line in TinyRun(moved).log()] == [1, 2, 3, 4]


def test_run_from_an_older_checkpoint_makes_its_own_pictures(tmp_path: Path) -> None:
    pictures = {
        "validation_disable": False,
        "validation_prompt": "a cat",
        "validation_resolution": "64",
        "validation_num_inference_steps": 2,
        "validation_step_interval": 2,
        "disable_benchmark": True,
    }
    run = TinyRun(tmp_path, keys=pictures)
    assert run.run() == 0
    grids = [run.output_dir / "validation" / f"step-{step}" / "grid.png" for step in (2, 4)]
    before = [grid.read_bytes() for grid in grids]
    assert run.run(resume_from_checkpoint="checkpoint-2", learning_rate=0.1) == 0
    after = [grid.read_bytes() for grid in grids]
    assert after[0] == before[0]
    assert after[1] != before[1]
