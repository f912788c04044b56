"""The endless order of samples is a pure function."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.sampler import Bucket, Sampler, draws_per_image, shuffled
from tests.counted import lines_run

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def sampler(
    sizes: list[int], *, batch_size: int, repeats: int = 0, seed: int = 0, share: float = 1.0
) -> Sampler:
    buckets = [
        Bucket(
            name=str(place),
            num_samples=size,
            samples_per_epoch=max(1, round(size * (repeats + 1) * share)),
            batch_size=batch_size,
        )
        for place, size in enumerate(sizes)
    ]
    return Sampler(buckets, seed=seed)


def counted(order: Sampler, start: int, stop: int) -> Counter[tuple[int, int]]:
    draws = (order.draw(index) for index in range(start, stop))
    return Counter((draw.bucket, sample) for draw in draws for sample in draw.samples)


@settings(max_examples=1000, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(0, 3), st.integers(0, 5), st.integers(0, 99))
@pytest.mark.reliability_row(32)
def test_each_sample_is_drawn_repeats_plus_one_times_per_epoch_when_buckets_divide(
    counts: list[int], batch_size: int, repeats: int, epoch: int, seed: int
) -> None:
    sizes = [count * batch_size for count in counts]
    order = sampler(sizes, batch_size=batch_size, repeats=repeats, seed=seed)
    length = order.batches_per_epoch
    assert length == sum(counts) * (repeats + 1)
    seen = counted(order, epoch * length, (epoch + 1) * length)
    assert set(seen.values()) == {repeats + 1}
    assert len(seen) == sum(sizes)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(0, 2), st.integers(1, 4), st.integers(0, 99))
@pytest.mark.reliability_row(32)
def test_no_sample_is_favoured_when_buckets_do_not_divide(
    sizes: list[int], batch_size: int, repeats: int, epochs: int, seed: int
) -> None:
    order = sampler(sizes, batch_size=batch_size, repeats=repeats, seed=seed)
    seen = counted(order, 0, epochs * order.batches_per_epoch)
    for bucket, size in enumerate(sizes):
        times = [seen[bucket, sample] for sample in range(size)]
        assert min(times) >= epochs * (repeats + 1)
        assert max(times) - min(times) <= 1


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 8), st.integers(0, 99), st.integers(0, 40))
@pytest.mark.reliability_row(4)
def test_a_draw_is_the_same_whatever_was_drawn_before(
    sizes: list[int], batch_size: int, seed: int, index: int
) -> None:
    used = sampler(sizes, batch_size=batch_size, seed=seed)
    earlier = [used.draw(number) for number in range(index + 1)]
    assert sampler(sizes, batch_size=batch_size, seed=seed).draw(index) == earlier[-1]


@pytest.mark.reliability_row(29)
def test_one_sample_fills_a_batch_of_eight() -> None:
    order = sampler([1], batch_size=8)
    assert order.batches_per_epoch == 1
    assert order.draw(5).samples == (0,) * 8


def test_a_share_of_a_bucket_moves_on_from_epoch_to_epoch() -> None:
    order = sampler([12], batch_size=2, share=0.25)
    assert order.batches_per_epoch == 2  # round(12 * 0.25) = 3 draws, filled up to 2 batches of 2
    assert set(counted(order, 0, 6).values()) == {1}


def test_epochs_and_seeds_have_their_own_order() -> None:
    order = sampler([64], batch_size=1)
    first = [order.draw(index).samples for index in range(64)]
    second = [order.draw(index).samples for index in range(64, 128)]
    other = sampler([64], batch_size=1, seed=1)
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != [other.draw(index).samples for index in range(64)]


def test_memory_is_bounded_over_any_number_of_epochs() -> None:
    order = sampler([1], batch_size=1)
    tracemalloc.start()
    try:
        draws = {order.draw(index).samples for index in range(3000)}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert draws == {(0,)}


def test_the_order_of_the_earliest_versions_stays() -> None:
    buckets = [
        Bucket("a 64x64", 5, 10, batch_size=2),
        Bucket("b 64x32", 3, 3, batch_size=2),
        Bucket("c 32x64", 2, 1, batch_size=2, group=1),
    ]
    order = Sampler(buckets, seed=7)
    found = [order.draw(index) for index in (0, 3, 9, 1000)]
    assert [(each.epoch, each.bucket, each.samples, each.passes, each.turn) for each in found] == [
        (0, 1, (1, 1), (0, 1), 1),
        (0, 0, (1, 4), (0, 0), 1),
        (1, 0, (0, 2), (2, 2), 5),
        (125, 1, (0, 2), (167, 167), 251),
    ]


def test_shuffled_is_the_same_on_every_machine() -> None:
    assert shuffled(42, "epoch", 3, length=8).tolist() == [0, 2, 7, 3, 5, 1, 4, 6]


def test_shuffled_is_uniform_enough() -> None:
    first = np.array([shuffled(0, "epoch", index, length=6)[0] for index in range(3000)])
    counts = np.bincount(first, minlength=6)
    # Chi-squared with 5 degrees of freedom: 20.5 is passed by chance once in a thousand.
    assert ((counts - 500) ** 2 / 500).sum() < 20.5


@pytest.mark.parametrize("index", [0, 999_999, 10**12])
def test_a_far_place_among_a_million_samples_is_found_without_a_walk_to_it(index: int) -> None:
    order = sampler([10**6], batch_size=1)
    assert lines_run(lambda: order.draw(index)) < 1000


def dataset(name: str, **keys: object) -> DatasetConfig:
    return DatasetConfig.model_construct(id=name, **{"repeats": 0, "probability": 1.0, **keys})


@pytest.mark.parametrize(
    ("numbers", "balanced"),
    [((4, 3, 1), [3.0, 3.0, 3.0]), ((4, 1, 1), [3.0, 6.0, 6.0]), ((4, 40, 8), [3.0, 0.25, 0.25])],
    ids=["fewer", "one each", "more"],
)
def test_an_epoch_draws_as_many_regularisation_images_as_others(
    numbers: tuple[int, ...], balanced: list[float]
) -> None:
    keeps = {"is_regularisation_data": True}
    datasets = [dataset("subject", repeats=2), dataset("class", **keeps), dataset("other", **keeps)]
    assert draws_per_image(datasets, numbers, balances=True) == balanced
    subject, *others = (number * draws for number, draws in zip(numbers, balanced, strict=True))
    assert sum(others) == subject
    assert draws_per_image(datasets, numbers, balances=False) == [3.0, 1.0, 1.0]
    assert draws_per_image(datasets[:1], numbers[:1], balances=True) == [3.0]


def test_balanced_datasets_keep_their_own_proportion() -> None:
    keeps = {"is_regularisation_data": True}
    datasets = [dataset("subject"), dataset("often", repeats=2, **keeps), dataset("seldom", **keeps)]
    assert draws_per_image(datasets, [8, 2, 2], balances=True) == [1.0, 3.0, 1.0]


def in_groups(groups: list[int], sizes: list[int], *, seed: int = 0, batch_size: int = 2) -> Sampler:
    buckets = [
        Bucket(name=str(place), num_samples=size, samples_per_epoch=size, batch_size=batch_size, group=group)
        for place, (group, size) in enumerate(zip(groups, sizes, strict=True))
    ]
    return Sampler(buckets, seed=seed)


def test_groups_of_equal_size_take_strict_turns_in_every_epoch() -> None:
    groups = [1, 0, 2, 0]
    order = in_groups(groups, [12, 6, 12, 6])
    drawn = [groups[order.draw(index).bucket] for index in range(3 * order.batches_per_epoch)]
    assert drawn == [0, 1, 2] * 18
    epochs = [
        [order.draw(index).samples for index in range(start, start + 18)]
        for start in range(0, 54, order.batches_per_epoch)
    ]
    assert epochs[0] != epochs[1]
    assert {sample for epoch in epochs for samples in epoch for sample in samples} == set(range(12))


def test_a_smaller_group_is_spread_over_the_epoch() -> None:
    groups = [0, 1]
    order = in_groups(groups, [24, 6])
    drawn = [groups[order.draw(index).bucket] for index in range(order.batches_per_epoch)]
    assert [place for place, group in enumerate(drawn) if group == 1] == [2, 7, 12]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 40))
def test_groups_change_the_order_of_an_epoch_and_nothing_else(
    members: list[tuple[int, int]], index: int
) -> None:
    groups, sizes = [group for group, _ in members], [size for _, size in members]
    turns, plain = in_groups(groups, sizes), in_groups([0] * len(sizes), sizes)
    if len(set(groups)) == 1:
        assert turns.draw(index) == plain.draw(index)
    length = plain.batches_per_epoch

    def epoch(order: Sampler) -> list[tuple[int, int, tuple[int, ...]]]:
        draws = [order.draw(each) for each in range(length, 2 * length)]
        return sorted((draw.bucket, draw.turn, draw.samples) for draw in draws)

    assert epoch(turns) == epoch(plain)
    assert in_groups(groups, sizes).draw(index) == turns.draw(index)


def test_orders_of_turns_are_kept_within_the_limit_of_all_orders() -> None:
    order = in_groups([0, 1], [2, 2])
    for epoch in range(1100):
        order.draw(epoch * order.batches_per_epoch)
        assert len(order._orders) <= 1024
