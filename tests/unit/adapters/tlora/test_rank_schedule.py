"""The rank at every timestep, against hand-computed values and LyCORIS's own formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.modules.tlora import compute_timestep_mask

from simpletuner.helpers.adapters.tlora.rank_schedule import (
    VARIANTS,
    LayerRanks,
    RankSchedule,
    min_rank_of,
    weighted_schedules,
)
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.configuration.schema.lycoris import ScheduleVariant
from simpletuner.helpers.errors import AdapterError

TIMESTEPS = (0, 1, 250, 500, 750, 900, 999, 1000)


@pytest.mark.parametrize(
    ("min_rank", "alpha", "variant", "ranks"),
    [
        (1, 1.0, "floor", (64, 63, 48, 32, 16, 7, 1, 1)),
        (1, 2.0, "floor", (64, 63, 36, 16, 4, 1, 1, 1)),
        (1, 0.5, "floor", (64, 63, 55, 45, 32, 20, 2, 1)),
        (32, 1.0, "floor", (64, 63, 56, 48, 40, 35, 32, 32)),
        (1, 1.0, "inclusive", (64, 64, 49, 33, 17, 7, 1, 1)),
    ],
)
def test_rank_at_gives_the_golden_table(
    min_rank: int, alpha: float, variant: str, ranks: tuple[int, ...]
) -> None:
    schedule = RankSchedule(64, min_rank=min_rank, alpha=alpha, variant=variant)
    assert tuple(schedule.rank_at(t) for t in TIMESTEPS) == ranks


@pytest.mark.parametrize("max_rank", [1, 4, 7, 16, 64, 128])
@pytest.mark.parametrize("alpha", [0.5, 0.7, 1.0, 1.5, 2.0])
def test_mask_equals_lycoris_formula_at_every_timestep(max_rank: int, alpha: float) -> None:
    for min_rank in {1, max_rank // 2 or 1, max_rank}:
        schedule = RankSchedule(max_rank, min_rank=min_rank, alpha=alpha)
        ours = schedule.mask(range(1001))
        theirs = [compute_timestep_mask(t, 1000, max_rank, min_rank, alpha) for t in range(1001)]
        assert torch.equal(ours, torch.cat(theirs))


def test_mask_rows_follow_their_own_timesteps() -> None:
    mask = RankSchedule(4).mask([1000, 500, 0])
    assert mask.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


@settings(max_examples=1000)
@given(
    data=st.data(),
    max_rank=st.integers(1, 256),
    alpha=st.floats(0.05, 8.0),
    variant=st.sampled_from(["floor", "inclusive"]),
)
@pytest.mark.reliability_row(32)
def test_rank_stays_within_its_range_and_falls_with_noise(
    data: st.DataObject, max_rank: int, alpha: float, variant: str
) -> None:
    min_rank = data.draw(st.integers(1, max_rank))
    first, second = sorted(data.draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2)))
    schedule = RankSchedule(max_rank, min_rank=min_rank, alpha=alpha, variant=variant)
    assert min_rank <= schedule.rank_at(second) <= schedule.rank_at(first) <= max_rank
    assert schedule.rank_at(0) == max_rank
    assert schedule.rank_at(1000) == min_rank


def test_inclusive_schedule_gives_every_rank_its_share_of_the_timesteps() -> None:
    ranks = [RankSchedule(4, variant="inclusive").rank_at(t) for t in range(1, 1001)]
    assert [ranks.count(rank) for rank in (4, 3, 2, 1)] == [250, 250, 250, 250]


def test_for_rank_lowers_the_minimum_with_the_maximum() -> None:
    assert RankSchedule(64, min_rank=32).for_rank(8) == RankSchedule(8, min_rank=8)


@pytest.mark.parametrize(
    "values",
    [
        {"max_rank": 4, "min_rank": 5},
        {"max_rank": 0},
        {"max_rank": 4, "min_rank": 0},
        {"max_rank": 4, "alpha": 0.0},
        {"max_rank": 4, "alpha": float("nan")},
        {"max_rank": 4, "num_timesteps": 0},
        {"max_rank": 4, "variant": "ceil"},
        {"max_rank": 8.5},
        {"max_rank": 4, "min_rank": 1.5},
        {"max_rank": 4, "num_timesteps": 999.5},
        {"max_rank": 4, "scale": "alpha"},
        {"max_rank": 4, "scale": "active", "variant": "cosine"},
    ],
)
def test_schedule_outside_its_range_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"_rank|alpha|num_timesteps|schedule|scale"):
        RankSchedule(**values)


@pytest.mark.parametrize("timestep", [-1, 1001])
def test_rank_at_a_timestep_outside_the_schedule_is_refused(timestep: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1000"):
        RankSchedule(4).rank_at(timestep)


def test_config_round_trip_keeps_every_field() -> None:
    schedule = RankSchedule(16, min_rank=4, alpha=0.7, num_timesteps=500, variant="inclusive")
    assert RankSchedule.from_config(schedule.config()) == schedule


@pytest.mark.parametrize("config", [{}, {"min_rank": 1}, {"max_rank": 4, "rank": 3}])
def test_malformed_config_names_what_it_should_hold(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="max_rank"):
        RankSchedule.from_config(config)


@pytest.mark.parametrize(
    ("variant", "expected"),
    # By hand for R_max 5, R_min 1: linear 1 + round(4 s), so s = 0.625 and 0.375 round 2.5 and 1.5 to 2;
    # cosine 1 + round(2 - 2 cos(pi s)).
    [
        ("linear", {0: 5, 375: 3, 500: 3, 625: 3, 874: 2, 1000: 1}),
        ("cosine", {0: 5, 250: 4, 500: 3, 750: 2, 1000: 1}),
    ],
)
def test_rounded_schedules_round_half_to_even_and_scale_the_active_ranks(
    variant: ScheduleVariant, expected: dict[int, int]
) -> None:
    schedule = RankSchedule(5, variant=variant)
    assert {t: schedule.rank_at(t) for t in expected} == expected
    for timestep, rank in expected.items():
        assert schedule.mask([timestep]).tolist() == [pytest.approx([5 / rank] * rank + [0.0] * (5 - rank))]
    assert RankSchedule.from_config(schedule.config()) == schedule


def test_every_variant_has_its_number_in_files() -> None:
    assert VARIANTS == ("floor", "inclusive", "cosine", "linear")
    for variant in VARIANTS:
        spec = TLoraSpec("vanilla", "last", RankSchedule(4, min_rank=2, variant=variant))
        assert TLoraSpec.read(spec.tensor(4)) == spec


@pytest.mark.parametrize("variant", ["cosine", "linear"])
def test_exponent_of_a_schedule_without_one_is_refused(variant: ScheduleVariant) -> None:
    with pytest.raises(ValueError, match="alpha"):
        RankSchedule(4, alpha=2.0, variant=variant)


@pytest.mark.parametrize("max_rank", [4, 8, 16, 64])
@pytest.mark.parametrize("min_rank", [1, 2, 4])
def test_rounded_schedules_equal_their_trainers_at_every_timestep(max_rank: int, min_rank: int) -> None:
    progress = 1 - torch.arange(1001).float() / 1000
    cosine = 0.5 - 0.5 * torch.cos(progress * math.pi)
    for variant, share in (("linear", progress), ("cosine", cosine)):
        theirs = min_rank + torch.round((max_rank - min_rank) * share).long()
        schedule = RankSchedule(max_rank, min_rank=min_rank, variant=variant)  # type: ignore[arg-type]
        assert [schedule.rank_at(t) for t in range(1001)] == theirs.tolist()


@pytest.mark.parametrize(
    ("value", "rank", "ranks"),
    # The last: 0.29 * 100 is 28.999999999999996 in floats.
    [(3, 8, 3), (0.5, 8, 4), (0.5, 7, 3), (0.01, 8, 1), (0.999, 8, 7), (0.29, 100, 29)],
)
def test_share_of_the_rank_is_rounded_down_and_at_least_one(value: float, rank: int, ranks: int) -> None:
    assert min_rank_of(value, rank) == ranks


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.0, 1.5, -0.5])
def test_neither_rank_nor_share_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="min_rank"):
        min_rank_of(value, 8)


def test_scale_active_multiplies_the_active_ranks_by_the_rank_over_their_number() -> None:
    schedule = RankSchedule(4, scale="active")
    assert schedule.mask([0, 500, 1000]).tolist() == [[1] * 4, [2, 2, 0, 0], [4, 0, 0, 0]]
    assert schedule.config()["scale"] == "active"
    assert RankSchedule.from_config(schedule.config()) == schedule
    assert "scale" not in RankSchedule(4).config()


def test_own_values_of_a_layer_replace_the_networks() -> None:
    network = RankSchedule(64, min_rank=32, alpha=2.0, variant="inclusive", scale="active")
    assert LayerRanks(16).schedule_in(network) == network.for_rank(16)
    own = LayerRanks(16, min_rank=4, alpha=0.5).schedule_in(network)
    assert own == RankSchedule(16, min_rank=4, alpha=0.5, variant="inclusive", scale="active")
    assert LayerRanks(4, min_rank=8).schedule_in(network).min_rank == 4
    assert LayerRanks(16, alpha=3.0).schedule_in(RankSchedule(64, variant="cosine")).alpha == 1.0


def test_layers_weigh_their_schedules_once_one_has_its_own() -> None:
    network = RankSchedule(8, min_rank=2)
    assert weighted_schedules([LayerRanks(8), LayerRanks(4)], network) == {network: 2}
    assert weighted_schedules([LayerRanks(8)], None) == {}
    layers = [LayerRanks(8), LayerRanks(8), LayerRanks(4, min_rank=1)]
    assert weighted_schedules(layers, network) == {network: 2, RankSchedule(4, min_rank=1): 1}


def test_files_hold_scale_and_own_values_in_a_version_that_older_programs_refuse() -> None:
    scaled = RankSchedule(8, min_rank=2, scale="active")
    for spec in (
        TLoraSpec("random", "last", scaled),
        TLoraSpec("vanilla", "last", RankSchedule(8), min_rank=3),
        TLoraSpec("vanilla", "last", RankSchedule(8), alpha=0.7),
        TLoraSpec("random", "middle", None, min_rank=3, alpha=2.0),
        TLoraSpec("weight", "last", scaled, min_rank=1, alpha=2.0),
    ):
        stored = spec.tensor(8)
        assert (stored[0], len(stored)) == (2, 12)
        assert TLoraSpec.read(stored) == spec
    assert TLoraSpec("random", "last", RankSchedule(8)).tensor(8).tolist() == [1, 1, 8, 1, 1.0, 1000, 0, 0, 2]


@pytest.mark.parametrize(
    ("index", "value"), [(0, 1), (0, 3), (9, 2), (9, 0.5), (10, -1), (10, 1.5), (11, -1)]
)
def test_invalid_scale_or_own_value_in_a_file_is_refused(index: int, value: float) -> None:
    stored = TLoraSpec("random", "last", RankSchedule(8, scale="active"), min_rank=2, alpha=2.0).tensor(8)
    stored[index] = value
    with pytest.raises(AdapterError, match="tlora_schedule"):
        TLoraSpec.read(stored)
