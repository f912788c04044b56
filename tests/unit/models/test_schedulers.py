"""Training schedule and samplers made from a model's scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import Component, ModelSource, find_component
from simpletuner.helpers.models.schedulers import make_sampler, training_alpha_bars


@pytest.fixture
def scheduler(tiny_sdxl: Path) -> Component:
    return find_component("scheduler", ModelSource(str(tiny_sdxl)), component_type="scheduler")


def test_training_alpha_bars_are_those_of_the_models_betas(scheduler: Component) -> None:
    alpha_bars = training_alpha_bars(scheduler, zero_snr=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(alpha_bars.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)


def test_training_alpha_bars_end_without_signal_when_rescaled(scheduler: Component) -> None:
    plain, rescaled = (training_alpha_bars(scheduler, zero_snr=zero_snr) for zero_snr in (False, True))
    assert plain[-1] > 0
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], plain[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_make_sampler_keeps_the_models_schedule(scheduler: Component, name: str) -> None:
    sampler = make_sampler(scheduler, name=name, prediction="v_prediction", zero_snr=False)
    assert type(sampler) is SAMPLERS[name].load_for("diffusion")
    assert sampler.config.beta_schedule == "scaled_linear"
    assert sampler.config.beta_end == 0.012
    assert sampler.config.prediction_type == "v_prediction"


def test_make_sampler_takes_the_models_own_class_without_a_name(scheduler: Component) -> None:
    sampler = make_sampler(scheduler, name=None, prediction="epsilon", zero_snr=False)
    assert isinstance(sampler, diffusers.EulerDiscreteScheduler)
    assert sampler.config.timestep_spacing == "leading"


def test_make_sampler_starts_at_the_last_timestep_for_a_schedule_without_signal(scheduler: Component) -> None:
    sampler = make_sampler(scheduler, name="ddim", prediction="v_prediction", zero_snr=True)
    sampler.set_timesteps(4)
    assert sampler.timesteps[0] == 999
    assert sampler.alphas_cumprod[-1] == 0


def test_make_sampler_refuses_an_unknown_name(scheduler: Component) -> None:
    with pytest.raises(ModelError, match=r"'eular' is not known.*euler"):
        make_sampler(scheduler, name="eular", prediction="epsilon", zero_snr=False)


def test_make_sampler_refuses_a_model_whose_sampler_is_of_another_kind(tmp_path: Path) -> None:
    folder = tmp_path / "scheduler"
    folder.mkdir()
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    component = find_component("scheduler", ModelSource(str(tmp_path)), component_type="scheduler")
    with pytest.raises(ModelError, match=r"FlowMatchEulerDiscreteScheduler.*validation_noise_scheduler"):
        make_sampler(component, name=None, prediction="epsilon", zero_snr=False)
