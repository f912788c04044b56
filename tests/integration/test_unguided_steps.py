"""Real guidance of Flux.1 that begins after some denoising steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from simpletuner.helpers.adapters.pipeline import one_pass_in_first_steps
from simpletuner.helpers.configuration.schema.sections import ValidationConfig
from tests.integration.family_runs import FLUX, IMAGES
from tests.integration.flux_pipelines import TEXT_TO_IMAGE, attach, sample
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}


@pytest.fixture(params=[False, True], ids=["plain", "t-lora"])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pipeline, with ranks that differ from step to step if it has an adapter."""
    made = TEXT_TO_IMAGE.make()
    if request.param:
        made._tlora_config = attach(made).tlora_config
    yield made
    assert made.transformer._compiled_call_impl is None


def counted(pipeline: Any) -> list[int]:
    """Counts the runs of the transformer, in a list of one number."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(add)
    return count


def guided_after(pipeline: Any, steps: int) -> np.ndarray:
    """The image of four steps by a slower way: every pass is made, and the first ones of a kind discarded."""
    outputs: list[Any] = []

    def replace(_module: nn.Module, _args: object, output: Any) -> Any:
        outputs.append(output)
        number = len(outputs) - 1
        return outputs[-2] if number % 2 and number < 2 * steps else None

    handle = pipeline.transformer.register_forward_hook(replace)
    try:
        return sample(pipeline, **GUIDED)
    finally:
        handle.remove()


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 9])
def test_no_second_pass_in_the_first_steps_and_guidance_in_the_others(pipeline: Any, steps: int) -> None:
    expected = guided_after(pipeline, steps)
    runs = counted(pipeline)
    with one_pass_in_first_steps(pipeline.transformer, steps=steps):
        found = sample(pipeline, **GUIDED)
    assert np.array_equal(found, expected)
    assert runs == [4 + max(0, 4 - steps)]


def test_no_steps_is_full_guidance_and_all_steps_none(pipeline: Any) -> None:
    plain, full = sample(pipeline), sample(pipeline, **GUIDED)
    assert np.abs(plain - full).max() > 1e-3
    for steps, expected in ((0, full), (4, plain)):
        with one_pass_in_first_steps(pipeline.transformer, steps=steps):
            assert np.array_equal(sample(pipeline, **GUIDED), expected)


def test_the_denoiser_is_whole_again_after_a_failure() -> None:
    pipeline = TEXT_TO_IMAGE.make()
    with pytest.raises(KeyError), one_pass_in_first_steps(pipeline.transformer, steps=1):
        raise KeyError
    assert pipeline.transformer._compiled_call_impl is None


def test_validation_makes_the_passes_that_its_keys_ask_for(tmp_path: Path) -> None:
    run: TinyRun = FLUX.run(tmp_path)
    keys = {"validation_guidance_real": 2.0, "validation_no_cfg_until_timestep": 1}
    with run.trainer(**IMAGES, **keys) as trainer:
        sampler = trainer.validation.sampler
        pipeline = sampler.make_pipeline(trainer.denoiser)
        runs = counted(pipeline)
        (prompt,) = sampler.prompts
        with sampler.eval_mode(trainer.denoiser):
            sampler.generate(pipeline, prompt, tmp_path / "image.png")
        assert runs == [5]  # of three steps, the last two are guided
        plain = ValidationConfig(validation_no_cfg_until_timestep=1)
        with trainer.family.sampling_context(pipeline, validation=plain):
            assert pipeline.transformer._compiled_call_impl is None


def test_a_cached_image_depends_on_the_steps_only_with_real_guidance(tmp_path: Path) -> None:
    def name(**keys: object) -> str:
        with FLUX.run(tmp_path).trainer(**IMAGES, **keys) as trainer:
            sampler = trainer.validation.sampler
            return sampler.cached_path(sampler.prompts[0]).name

    real = {"validation_guidance_real": 2.0}
    names = [name(), name(validation_no_cfg_until_timestep=2), name(**real)]
    names.append(name(**real, validation_no_cfg_until_timestep=2))
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_the_key_is_accepted_without_effect_by_another_family(tmp_path: Path) -> None:
    config = TinyRun(tmp_path).config(validation_no_cfg_until_timestep=2)
    assert [each.key for each in config.decisions] == ["validation_no_cfg_until_timestep"]
