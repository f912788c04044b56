"""What to change when a run does not fit: real keys, the cheapest first, each with the estimate after it."""

from __future__ import annotations

import pytest

from simpletuner.helpers.estimating.advice import FITS, Suggestion, suggestions
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.models.registry import specs
from tests.unit.estimating.conftest import Example

GIB = 2**30
NAMES = (
    *("flux-dev-tlora", "flux-dev-lokr", "flux2-dev-tlora", "flux2-klein-edit-tlora"),
    *("sdxl-embedding", "sdxl-full", "sdxl-lokr", "sdxl-tlora-paper"),
)


def advice(example: Example, name: str, *overrides: str, memory_gib: float) -> list[Suggestion]:
    run = example(name, *overrides)
    return suggestions(run, specs()[run.model.model_family], memory_bytes=round(memory_gib * GIB))


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_takes_every_change_and_has_the_estimate_of_it(example: Example, name: str) -> None:
    found = advice(example, name, memory_gib=0.5)
    given: list[str] = []
    for each in found:
        given += each.values
        after = estimate(example(name, *given))
        assert after is not None
        assert after.peak_device_bytes == each.peak_device_bytes, each.values
    peaks = [each.peak_device_bytes for each in found]
    assert peaks == sorted(peaks, reverse=True)
    assert found


def test_nothing_is_changed_if_it_fits(example: Example) -> None:
    assert advice(example, "sdxl-tlora-paper", memory_gib=12) == []
    assert advice(example, "sdxl-tlora-paper", memory_gib=10) != []


def test_changes_end_when_it_fits_and_none_is_superfluous(example: Example) -> None:
    found = advice(example, "flux-dev-tlora", memory_gib=16)
    assert [each.values for each in found] == [("base_model_precision=nf4-bnb",)]
    assert found[-1].peak_device_bytes <= FITS * 16 * GIB


def test_what_costs_time_comes_before_what_costs_exactness(example: Example) -> None:
    given = ("gradient_checkpointing=false", "base_model_precision=no_change", "train_batch_size=4")
    found = advice(example, "flux-dev-tlora", *given, memory_gib=24)
    keys = [each.values[0].partition("=")[0] for each in found]
    assert keys == ["gradient_checkpointing", "train_batch_size", "base_model_precision"]
    assert "gradient_accumulation_steps=4" in found[1].values


def test_the_largest_phase_decides_what_helps(example: Example) -> None:
    found = advice(example, "flux2-klein-9b-tlora", memory_gib=16)
    assert found[0].values == ("text_encoder_1_precision=int8-torchao",)


def test_a_whole_model_steps_in_the_backward_pass(example: Example) -> None:
    given = ("fused_backward_pass=false", "optimizer=adafactor")
    found = advice(example, "sdxl-full", *given, memory_gib=12)
    assert ("fused_backward_pass=true", "max_grad_norm=0") in [each.values for each in found]


def test_images_get_smaller_with_their_validation_images(example: Example) -> None:
    found = advice(example, "flux-dev-tlora", memory_gib=11)
    assert found[-1].values == ("resolution=768",)
    assert found[-1].peak_device_bytes <= FITS * 11 * GIB < found[-2].peak_device_bytes


def test_two_phases_of_nearly_one_size_get_smaller_in_turn(example: Example) -> None:
    found = advice(example, "flux-dev-tlora", memory_gib=8)
    assert found[-1].peak_device_bytes <= FITS * 8 * GIB
    assert found[0].values == ("text_encoder_2_precision=int8-torchao",)
