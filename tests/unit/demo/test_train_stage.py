"""A training stage: learning rate, EMA weights and resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.demo.train_stage import Schedule, TrainStage

SCHEDULE = Schedule(steps=6, learning_rate=0.1, save_interval=3)


class Stopped(Exception):
    """Interrupts the run."""


def make_module() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def loss_on(module: nn.Linear, step: int) -> Tensor:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return (module(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()


def run(file: Path, *, stop_at: int | None = None) -> tuple[nn.Linear, TrainStage]:
    def stop(step: int) -> None:
        if step == stop_at:
            raise Stopped

    module = make_module()
    stage = TrainStage([module], schedule=SCHEDULE, file=file)
    stage.train(lambda step: loss_on(module, step), after_step=stop)
    return module, stage


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.008), (99, 0.8), (500, 0.8), (700, 0.8), (850, 0.4), (999, 0.8 / 300)]
)
def test_learning_rate_warms_up_stays_and_decays(step: int, rate: float) -> None:
    assert Schedule(steps=1000, learning_rate=0.8).learning_rate_at(step) == pytest.approx(rate)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_stage = run(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        run(tmp_path / "parts.pt", stop_at=4)
    resumed, resumed_stage = run(tmp_path / "parts.pt")
    assert not torch.equal(whole.weight, make_module().weight)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed_stage.ema[0], whole_stage.ema[0])
    assert resumed_stage.step == 6


def test_finished_stage_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.demo.train_stage.perf_counter", itertools.count().__next__)
    run(tmp_path / "stage.pt")
    module = make_module()
    stage = TrainStage([module], schedule=SCHEDULE, file=tmp_path / "stage.pt")
    stage.train(lambda _: pytest.fail("trained"), after_step=lambda _: None)
    assert stage.seconds == SCHEDULE.steps, "one second per step by this clock"


def test_modules_hold_ema_weights_inside_the_context_only(tmp_path: Path) -> None:
    module, stage = run(tmp_path / "stage.pt")
    trained = module.weight.detach().clone()
    with stage.ema_weights():
        assert torch.equal(module.weight, stage.ema[0])
        assert not torch.equal(module.weight, trained)
    assert torch.equal(module.weight, trained)
    stage.load_ema()
    assert torch.equal(module.weight, stage.ema[0])


def test_ema_decay_is_smaller_in_early_steps(tmp_path: Path) -> None:
    module = make_module()
    start = module.weight.detach().clone()
    stage = TrainStage([module], schedule=Schedule(steps=1, learning_rate=1.0), file=tmp_path / "stage.pt")
    stage.train(lambda step: loss_on(module, step), after_step=lambda _: None)
    assert torch.allclose(stage.ema[0], start.lerp(module.weight.detach(), 0.9))
