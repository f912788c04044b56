"""The bundled Flux.1 pipelines: diffusers' own without an adapter; with one, right ranks at each step."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.models.flux import pipeline as bundled
from tests.integration.flux_pipelines import CASES, TEXT_TO_IMAGE, Case, attach, sample, stock

SCHEDULE = RankSchedule(8, min_rank=2)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SCHEDULERS: dict[Any, dict[str, Any]] = {
    FlowMatchEulerDiscreteScheduler: {},
    FlowMatchLCMScheduler: {},
    DPMSolverMultistepScheduler: FLOW,
    UniPCMultistepScheduler: FLOW,
}


def record_steps(
    pipeline: Any, adapter: LycorisAdapter, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, tuple[int, ...]]]:
    """(timestep handed to scheduler.step, open ranks of the denoiser calls before it) of each step."""
    steps: list[tuple[float, tuple[int, ...]]] = []
    open_ranks: list[int] = []

    def look(*_: object) -> None:
        current = mask.current_mask(adapter.group, 8)
        assert current is not None
        open_ranks.append(int(current.sum()))

    pipeline.transformer.x_embedder.register_forward_hook(look)
    step = pipeline.scheduler.step

    def watched(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append((float(timestep), tuple(open_ranks)))
        open_ranks.clear()
        assert mask.current_mask(adapter.group, 8) is None, "the mask outlived the denoiser call"
        return step(output, timestep, *args, **kwargs)

    monkeypatch.setattr(pipeline.scheduler, "step", watched)
    return steps


def test_every_bundled_class_is_tried() -> None:
    classes = {
        name for name, value in vars(bundled).items() if name.startswith("Flux") and isinstance(value, type)
    }
    assert {case.name for case in CASES} == classes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bundled_pipeline_equals_the_stock_one_bit_for_bit(case: Case) -> None:
    own, theirs = case.make(), case.make(stock)
    expected = sample(theirs, case)
    assert expected.std() > 0.01
    assert np.array_equal(sample(own, case), expected)
    assert inspect.signature(type(own).__call__) == inspect.signature(type(theirs).__call__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pipeline_opens_the_ranks_of_the_step_it_takes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = case.make()
    pipeline._tlora_config = attach(pipeline).tlora_config
    adapter = attach(pipeline)  # a second network: each opens its own group
    strengths = (0.5, 1.0) if case.starts_from_image else (None,)
    for strength in strengths:
        with monkeypatch.context() as patch:
            steps = record_steps(pipeline, adapter, patch)
            options = {} if strength is None else {"strength": strength}
            sample(pipeline, case, num_inference_steps=6, **options)
        assert len(steps) == (3 if strength == 0.5 else 6)
        assert steps == [(t, (SCHEDULE.rank_at(int(t)),)) for t, _ in steps]
        assert len({ranks for _, ranks in steps}) > 1


def is_taken(case: Case, scheduler: Any) -> bool:
    """Whether diffusers' pipeline can be sampled with this scheduler."""
    takes_flow_only = case.starts_from_image or case.name in ("FluxKontextPipeline", "FluxControlNetPipeline")
    return "FlowMatch" in scheduler.__name__ or not takes_flow_only


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [
        pytest.param(case, kind, id=f"{case}-{kind.__name__}")
        for case in CASES
        for kind in SCHEDULERS
        if case.is_guided and is_taken(case, kind)
    ],
)
def test_both_passes_are_masked_with_any_scheduler_that_the_pipeline_takes(
    case: Case, scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = case.make()
    config = {**pipeline.scheduler.config, **SCHEDULERS[scheduler]}
    pipeline.scheduler = scheduler.from_config(config)
    adapter = attach(pipeline)
    pipeline._tlora_config = adapter.tlora_config
    steps = record_steps(pipeline, adapter, monkeypatch)
    sample(pipeline, case, negative_prompt="blurry", true_cfg_scale=2.0)
    assert len(steps) >= 2
    assert steps == [(t, (SCHEDULE.rank_at(int(t)),) * 2) for t, _ in steps]


@pytest.mark.parametrize(
    ("case", "scheduler"),
    [
        (CASES[0], FlowMatchHeunDiscreteScheduler),
        (CASES[1], DPMSolverMultistepScheduler),
        (CASES[4], DPMSolverMultistepScheduler),
    ],
    ids=str,
)
def test_other_schedulers_are_refused_by_diffusers_itself(case: Case, scheduler: Any) -> None:
    pipeline = case.make()
    pipeline.scheduler = scheduler.from_config({**pipeline.scheduler.config, **SCHEDULERS.get(scheduler, {})})
    with pytest.raises(ValueError, match="does not support custom"):
        sample(pipeline, case)


def test_mask_is_gone_after_a_call_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = TEXT_TO_IMAGE.make()
    adapter = attach(pipeline)
    pipeline._tlora_config = adapter.tlora_config

    def fail(*_: object) -> None:
        raise KeyError("denoiser")

    hook = pipeline.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(KeyError, match="denoiser"):
        sample(pipeline)
    hook.remove()
    assert mask.current_mask(adapter.group, 8) is None
    assert not pipeline.transformer._forward_pre_hooks
    sample(pipeline)


def test_the_mask_changes_the_picture_and_a_stock_pipeline_gets_it_by_one_call(tmp_path: Any) -> None:
    pipeline = TEXT_TO_IMAGE.make()
    base = sample(pipeline)
    adapter = attach(pipeline)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    adapter.save(file, metadata={"model_family": "flux"})
    unmasked = sample(pipeline)
    pipeline._tlora_config = adapter.tlora_config
    masked = sample(pipeline)
    assert np.abs(masked - unmasked).max() > 1e-3
    assert np.abs(masked - base).max() > 1e-3
    theirs = TEXT_TO_IMAGE.make(stock)
    load_into_pipeline(theirs, file)
    np.testing.assert_allclose(sample(theirs), masked, rtol=0, atol=1e-5)
