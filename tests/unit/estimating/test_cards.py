"""Named cards and the time of a run on them."""

from __future__ import annotations

import pytest

from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.estimating.cards import EFFICIENCY, Card, Work, card_named, cards
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.estimating.run_facts import facts_of
from simpletuner.helpers.estimating.work import work_of
from simpletuner.helpers.models.registry import specs
from tests.unit.estimating.conftest import Example

CARD = Card("test", 24, 100.0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4080", "RTX 4080"),
        ("rtx 4080 super", "RTX 4080 SUPER"),
        ("a100", "A100 40GB"),
        ("4060 ti", "RTX 4060 Ti 8GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("h100", "H100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("4070 ti", "RTX 4070 Ti"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_card_is_found_by_its_name(name: str, found: str) -> None:
    assert card_named(name).name == found


@pytest.mark.parametrize(
    "name", ["", "RTX", "RTX 9999", "L40", "RTX 6000", "nvidia", "日本", "40", "RTX 40", "A1"]
)
def test_an_unknown_card_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"RTX 3060.*MI300X.*--memory"):
        card_named(name)


def test_every_card_is_found_by_itself() -> None:
    assert [card_named(card.name) for card in cards()] == list(cards())


def test_the_time_is_that_of_arithmetic_and_copies() -> None:
    work = Work(
        flops_per_step=EFFICIENCY * 2e14,
        copied_per_step=40e9,
        validation_flops=EFFICIENCY * 5e14,
        num_steps=10,
    )
    assert work.seconds_per_step(CARD) == pytest.approx(2 + 2)
    assert work.seconds(CARD) == pytest.approx(10 * 4 + 5)


def test_work_follows_the_configuration(example: Example) -> None:
    def flops(*overrides: str) -> float:
        found = estimate(example("flux2-klein-4b-tlora", *overrides))
        assert found is not None
        assert found.work is not None
        return found.work.flops_per_step

    plain = flops()
    assert flops("gradient_accumulation_steps=4") == 4 * plain
    assert flops("train_batch_size=2") == 2 * plain
    assert 0.65 < flops("gradient_checkpointing=false") / plain < 0.8
    assert flops("resolution=512") < plain / 2
    offloaded = estimate(example("flux2-klein-4b-tlora", "enable_group_offload=true"))
    assert offloaded is not None
    assert offloaded.work is not None
    assert offloaded.work.copied_per_step == pytest.approx(2 * 2 * 3.88e9, rel=0.01)


def test_the_steps_follow_from_epochs_and_images(example: Example) -> None:
    run = example("flux2-klein-4b-tlora", "max_train_steps=0", "num_train_epochs=7")
    facts = facts_of(run, specs()["flux2"])
    assert facts is not None
    assert facts.num_images == 1
    assert facts.num_steps == 7
    work = work_of(facts)
    assert work is not None
    assert work.num_steps == 7


def test_float32_has_no_time(example: Example) -> None:
    found = estimate(example("flux2-klein-4b-tlora", "mixed_precision=no"))
    assert found is not None
    assert found.work is None
