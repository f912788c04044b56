"""A value of every choice from a package outside: its record is registered and a run uses it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS
from simpletuner.helpers.choices.captions import CAPTION_SOURCES
from simpletuner.helpers.choices.losses import LOSSES
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS
from simpletuner.helpers.choices.samplers import SAMPLERS, samplers_of
from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.configuration.reference import reference
from simpletuner.helpers.errors import CheckpointError, ConfigError, MissingDependencyError
from simpletuner.helpers.models import registry
from simpletuner.helpers.reporting.html_report.page import write_page
from simpletuner.lycoris_defaults import default_lycoris_config
from tests.integration.tiny_runs import TinyRun

REGISTRIES: tuple[dict[str, Any], ...] = (
    OPTIMIZERS,
    LR_SCHEDULES,
    LOSSES,
    SAMPLERS,
    PRECISIONS,
    ALGORITHMS,
    ARGUMENTS,
    CAPTION_SOURCES,
    TRACKERS,
)


@pytest.fixture(autouse=True)
def weavers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, in a folder outside the repository; its records are gone after the test."""
    outside, before = tmp_path / "outside", [dict(each) for each in REGISTRIES]
    (outside / "weavers").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("outside_choices.py"), outside / "weavers" / "__init__.py")
    monkeypatch.syspath_prepend(outside)
    import weavers

    yield weavers
    del sys.modules["weavers"]
    for each, records in zip(REGISTRIES, before, strict=True):
        each.clear()
        each.update(records)


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path / "run")


def test_optimiser_trains_and_resumes_with_its_group_state(run: TinyRun, tmp_path: Path) -> None:
    keys: dict[str, object] = {"optimizer": "shrinking", "optimizer_config": "decay=0.5"}
    whole = TinyRun(tmp_path / "whole")
    assert whole.run(**keys) == 0
    assert run.run(**keys, max_train_steps=2) == 0
    with run.trainer(**keys) as trainer:
        assert trainer.optimizer.param_groups[0]["size"] == 0.25
        counts = [state["counts"] for state in trainer.optimizer.state.values()]
        assert {(each.dtype, *each.tolist()) for each in counts} == {(torch.int32, 2, 2, 2)}
        assert trainer.run() == 0
    assert run.log()[2:] == whole.log()[2:]


def test_optimiser_that_no_checkpoint_can_hold_ends_the_run_at_its_first_step(
    run: TinyRun, weavers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = weavers.Shrinking.step

    def odd_step(self: Any, closure: None = None) -> None:
        step(self)
        self.param_groups[0]["seen"] = {1}

    monkeypatch.setattr(weavers.Shrinking, "step", odd_step)
    with run.trainer(optimizer="shrinking") as trainer:
        with pytest.raises(CheckpointError, match=r"seen .*set"):
            trainer.run()
        assert trainer.progress.step == 1


def test_optimiser_checks_its_own_arguments(run: TinyRun) -> None:
    with pytest.raises(ConfigError, match=r"decya .*decay"):
        run.config(optimizer="shrinking", optimizer_config="decya=0.5")


def test_learning_rate_schedule_sets_the_rate(run: TinyRun) -> None:
    assert run.run(lr_scheduler="stairs", lr_warmup_steps=0, lr_end=2e-4) == 0
    assert [line["lr"] for line in run.log()] == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4])


def test_loss_is_minimised_and_written_down(run: TinyRun, tmp_path: Path) -> None:
    square = TinyRun(tmp_path / "square")
    assert square.run(max_train_steps=1) == 0
    assert run.run(max_train_steps=1, loss_type="l1") == 0
    (line,), (square_line,) = run.log(), square.log()
    # E|x| of a normal variable is 0.80 of its standard deviation, and the tiny model predicts almost 0.
    assert line["loss"] == pytest.approx(0.8 * square_line["loss"] ** 0.5, rel=0.1)
    assert json.loads((run.output_dir / "config.resolved.json").read_text())["loss_type"] == "l1"


def test_sampler_of_a_family_makes_its_images(run: TinyRun, weavers: Any) -> None:
    weavers.STEPS_SAMPLED.clear()
    keys = {
        "validation_disable": False,
        "validation_prompt": "a",
        "validation_num_inference_steps": 3,
        "validation_step_interval": 0,
        "disable_benchmark": True,
        "validation_noise_scheduler": "noted",
    }
    assert run.run(**keys, max_train_steps=1) == 0
    assert len(weavers.STEPS_SAMPLED) == 3
    assert "noted" not in samplers_of(registry.specs()["flux"])


def test_precision_quantises_the_blocks(run: TinyRun) -> None:
    with run.trainer(base_model_precision="sixteenths") as trainer:
        weights = [
            module.weight * 16
            for path, module in trainer.denoiser.named_modules()
            if isinstance(module, nn.Linear) and ".attn1.to_q" in path and "lycoris" not in path
        ]
        assert len(weights) > 1
        assert all(torch.equal(weight, weight.round()) for weight in weights)
        assert trainer.run() == 0


def test_algorithm_with_an_argument_of_its_own_trains_under_its_name(run: TinyRun, weavers: Any) -> None:
    run.lycoris = default_lycoris_config("loud") | {
        "loudness": 5,
        "apply_preset": {"target_module": ["Attention"]},
    }
    del run.lycoris["gain"]
    with run.trainer(lora_format="comfyui") as trainer:
        layers = [each for each in trainer.denoiser.modules() if isinstance(each, weavers.LoudLayer)]
        assert layers
        assert {layer.scale for layer in layers} == {5.0}
        assert trainer.validation.title == "LouDRA"
        assert trainer.run() == 0
    assert "LouDRA on" in write_page(run.output_dir).read_text()
    run.lycoris["rank_dropout"] = 0.5
    with pytest.raises(ConfigError, match="rank_dropout"):
        run.config()


def test_algorithm_of_some_layers_takes_its_argument_there(run: TinyRun, weavers: Any) -> None:
    run.lycoris["apply_preset"] = {
        "target_module": ["Attention"],
        "module_algo_map": {"FeedForward": {"algo": "loud", "gain": 2}},
    }
    with run.trainer() as trainer:
        layers = [each for each in trainer.denoiser.modules() if isinstance(each, weavers.LoudLayer)]
        assert {layer.scale for layer in layers} == {2.0}


def test_caption_source_reads_its_files(run: TinyRun) -> None:
    for index in range(run.num_images):
        (run.folder / "images" / f"image{index}.caption").write_text(json.dumps({"text": f"json {index}"}))
    with run.trainer(caption_strategy="js") as trainer:
        assert trainer.config.datasets[0].caption_strategy == "braces"
        assert sorted(sample.caption for sample in trainer.data.samples) == ["json 0", "json 1", "json 2"]


def test_tracker_records_the_run(run: TinyRun) -> None:
    assert run.run(report_to="losses") == 0
    lines = (run.output_dir / "losses.txt").read_text().splitlines()
    assert lines == [f"{line['step']} {line['loss']}" for line in run.log()]


def test_package_of_a_choice_is_missed_before_anything_is_cached(run: TinyRun) -> None:
    TRACKERS["losses"] = type(TRACKERS["losses"])(
        name="losses",
        summary="A text file.",
        build="weavers:Losses",
        package="no_such_package",
        extra="track",
    )
    with pytest.raises(MissingDependencyError, match="report_to losses needs no_such_package"):
        run.run(report_to="losses")
    assert not (run.folder / "cache").exists()


def test_reference_page_has_every_value(weavers: Any) -> None:
    page = reference(registry.specs())
    for name in ("shrinking", "stairs", "l1", "noted", "sixteenths", "loud", "braces", "losses", "gain"):
        assert f"| `{name}`" in page
