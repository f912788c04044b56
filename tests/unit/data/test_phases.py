"""Datasets that begin or end within a run."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import TrainingConfig
from simpletuner.helpers.data.phases import (
    Calendar,
    Curriculum,
    DatasetBuckets,
    calendar_of,
    even,
    gap_problem,
    idle_datasets,
    stretch_lines,
)
from simpletuner.helpers.data.sampler import Bucket, Sampler
from simpletuner.helpers.errors import CheckpointError
from tests.counted import lines_run

NUMBERS = {"low": 6, "high": 4}


def dataset(name: str = "low", **keys: object) -> DatasetConfig:
    return DatasetConfig.model_construct(id=name, **{"repeats": 0, "probability": 1.0, **keys})


def calendar(*datasets: DatasetConfig, batches_per_step: int = 1) -> Calendar:
    """One batch for each image of NUMBERS."""
    return calendar_of(
        datasets,
        lambda places: sum(NUMBERS[datasets[place].id] for place in places),
        batches_per_step=batches_per_step,
    )


def stretches(found: Calendar) -> list[tuple[int, int, int, tuple[int, ...]]]:
    return [(each.start, each.epoch, each.length, each.datasets) for each in found.stretches]


def curriculum(*datasets: DatasetConfig, batch_size: int = 1, balances: bool = False) -> Curriculum:
    return Curriculum(
        [
            DatasetBuckets(each, {each.id: NUMBERS[each.id]}, batch_size=each.train_batch_size or batch_size)
            for each in datasets
        ],
        seed=3,
        batches_per_step=1,
        balances=balances,
    )


@pytest.mark.parametrize(
    ("low", "high", "batches_per_step", "expected"),
    [
        ({}, {}, 1, [(0, 0, 10, (0, 1))]),
        ({"end_step": 12}, {"start_step": 13}, 1, [(0, 0, 6, (0,)), (12, 2, 4, (1,))]),
        ({"end_step": 12}, {"start_step": 13}, 2, [(0, 0, 6, (0,)), (24, 4, 4, (1,))]),
        # The third epoch is cut after 3 of its 6 batches.
        ({"end_step": 15}, {"start_step": 16}, 1, [(0, 0, 6, (0,)), (15, 3, 4, (1,))]),
        ({}, {"start_step": 4, "end_step": 8}, 1, [(0, 0, 6, (0,)), (3, 1, 10, (0, 1)), (8, 2, 6, (0,))]),
        ({"end_epoch": 2}, {"start_epoch": 3}, 1, [(0, 0, 6, (0,)), (12, 2, 4, (1,))]),
        ({}, {"start_epoch": 2, "end_epoch": 2}, 1, [(0, 0, 6, (0,)), (6, 1, 10, (0, 1)), (16, 2, 6, (0,))]),
        # Both must hold: epoch 2 begins with batch 6, step 9 is within it.
        ({}, {"start_epoch": 2, "start_step": 9}, 1, [(0, 0, 6, (0,)), (8, 2, 10, (0, 1))]),
        ({}, {"start_epoch": 3, "start_step": 2}, 1, [(0, 0, 6, (0,)), (12, 2, 10, (0, 1))]),
        ({"start_step": 0, "start_epoch": 0}, {"start_step": 1}, 1, [(0, 0, 10, (0, 1))]),
    ],
    ids=[
        *("always", "one after the other", "accumulated", "cut", "between", "epochs", "one epoch"),
        *("later by step", "later by epoch", "from zero"),
    ],
)
def test_stretches_of_a_run(
    low: dict[str, int],
    high: dict[str, int],
    batches_per_step: int,
    expected: list[tuple[int, int, int, tuple[int, ...]]],
) -> None:
    found = calendar(dataset(**low), dataset("high", **high), batches_per_step=batches_per_step)
    assert stretches(found) == expected
    assert found.end is None


def test_a_calendar_ends_where_no_dataset_is_active() -> None:
    found = calendar(dataset(end_step=7), dataset("high", start_step=9))
    assert (stretches(found), found.end) == ([(0, 0, 6, (0,))], 7)
    later = calendar(dataset(start_step=2))
    assert (later.stretches, later.end) == ((), 0)


def test_epochs_are_counted_over_stretches() -> None:
    # 6 batches, 3 of a cut epoch, then epochs of 4.
    found = calendar(dataset(end_step=9), dataset("high", start_step=10))
    assert [found.epoch_of(batch) for batch in range(15)] == [0] * 6 + [1] * 3 + [2] * 4 + [3] * 2
    assert [found.end_of(epochs) for epochs in range(5)] == [0, 6, 9, 13, 17]
    assert (found.epochs_before(9), found.epochs_before(15)) == (1.5, 3.5)
    training = TrainingConfig(num_train_epochs=3, gradient_accumulation_steps=2)
    assert found.num_steps(training) == 7
    assert found.num_steps(TrainingConfig(max_train_steps=5)) == 5


@given(st.integers(1, 9), st.integers(0, 200))
def test_even_epochs_are_those_of_a_division(length: int, batch: int) -> None:
    assert even(length).epoch_of(batch) == batch // length
    assert even(length).end_of(batch) == batch * length


@pytest.mark.parametrize(
    ("low", "training", "expected"),
    [
        ({"end_step": 7}, {"max_train_steps": 7}, None),
        ({"end_step": 7}, {"max_train_steps": 8}, "step 8, where epoch 3 begins"),
        ({"end_epoch": 2}, {"num_train_epochs": 2}, None),
        ({"end_epoch": 2}, {"num_train_epochs": 3}, "step 13, where epoch 3 begins"),
        ({"end_epoch": 2}, {"max_train_steps": 12}, None),
        ({"end_epoch": 2}, {"max_train_steps": 13}, "step 13, where epoch 3 begins"),
        ({"start_step": 2}, {}, "step 1, where epoch 1 begins"),
    ],
    ids=["whole", "step", "whole epochs", "epoch", "epochs in steps", "step after epochs", "at once"],
)
def test_a_run_without_data_is_named(
    low: dict[str, int], training: dict[str, int], expected: str | None
) -> None:
    problem = gap_problem(calendar(dataset(**low)), TrainingConfig(**training))
    assert (problem is None) == (expected is None)
    assert str(expected) in str(problem)


def test_a_dataset_that_begins_after_the_run_is_named_and_each_stretch_has_a_line() -> None:
    datasets = [dataset(), dataset("high", start_step=9)]
    found, short, long = (
        calendar(*datasets),
        TrainingConfig(max_train_steps=8),
        TrainingConfig(max_train_steps=9),
    )
    (text,) = idle_datasets(datasets, found, short)
    assert "dataset high takes part in none of the 8 steps" in text
    assert idle_datasets(datasets, found, long) == []
    assert stretch_lines(datasets, found, long) == [
        "from step 1: low; epochs of 6 batches",
        "from step 9: low, high; epochs of 10 batches",
    ]
    assert stretch_lines([dataset()], calendar(dataset()), long) == []


def test_a_run_of_one_stretch_has_the_order_of_its_buckets() -> None:
    plain = Sampler([Bucket(name, number, number, batch_size=2) for name, number in NUMBERS.items()], seed=3)
    found = curriculum(dataset(), dataset("high"), batch_size=2)
    assert [found.draw(index) for index in range(40)] == [plain.draw(index) for index in range(40)]


def test_passes_go_on_from_stretch_to_stretch() -> None:
    # low alone for 2 epochs, both for 1, low alone again.
    found = curriculum(dataset(), dataset("high", start_epoch=3, end_epoch=3))
    draws = [found.draw(index) for index in range(12 + 10 + 6)]
    assert {draw.bucket for draw in draws[:12]} == {0}
    assert Counter(draw.bucket for draw in draws[12:22]) == {0: 6, 1: 4}
    low = [draw for draw in draws if draw.bucket == 0]
    assert sorted(draw.turn for draw in low) == list(range(24))
    assert Counter(draw.samples for draw in low) == {(sample,): 4 for sample in range(6)}
    assert [draw.epoch for draw in draws] == [0] * 6 + [1] * 6 + [2] * 10 + [3] * 6


def test_the_first_pass_of_a_later_dataset_is_its_first() -> None:
    found = curriculum(dataset(end_step=9), dataset("high", start_step=10))
    draws = [found.draw(index) for index in range(9, 13)]
    assert {(draw.bucket, draw.passes) for draw in draws} == {(1, (0,))}
    assert sorted(draw.turn for draw in draws) == [0, 1, 2, 3]


def test_regularisation_images_balance_those_that_are_active() -> None:
    found = curriculum(
        dataset("high", end_epoch=1), dataset(is_regularisation_data=True), balances=True
    ).calendar
    assert [(each.length, each.datasets) for each in found.stretches] == [(8, (0, 1)), (6, (1,))]


WINDOWS = st.fixed_dictionaries(
    {
        "start_step": st.integers(0, 20),
        "end_step": st.none() | st.integers(20, 40),
        "start_epoch": st.integers(0, 3),
        "end_epoch": st.none() | st.integers(3, 6),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(WINDOWS, min_size=1, max_size=4), st.integers(1, 3))
def test_every_batch_comes_from_a_dataset_that_is_active_in_its_step_and_epoch(
    windows: list[dict[str, int | None]], batches_per_step: int
) -> None:
    datasets = [dataset(str(place), **keys) for place, keys in enumerate(windows)] + [dataset("low")]
    found = Curriculum(
        [DatasetBuckets(each, {each.id: 3}, batch_size=2) for each in datasets],
        seed=1,
        batches_per_step=batches_per_step,
        balances=False,
    )
    epochs = []
    for index in range(150):
        draw = found.draw(index)
        own, step, epoch = datasets[draw.bucket], index // batches_per_step + 1, draw.epoch + 1
        assert own.start_step <= step <= (own.end_step or step)
        assert own.start_epoch <= epoch <= (own.end_epoch or epoch)
        assert draw.epoch == found.calendar.epoch_of(index)
        epochs.append(draw.epoch)
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(epochs))
    assert [index for index in range(1, 150) if epochs[index] != epochs[index - 1]] == [
        found.calendar.end_of(epoch) for epoch in range(1, epochs[-1] + 1)
    ]


@pytest.mark.parametrize("index", [0, 10**12])
def test_a_far_batch_is_found_without_a_walk_to_it(index: int) -> None:
    order = curriculum(dataset(end_step=15), dataset("high", start_step=16))
    assert lines_run(lambda: order.draw(index)) < 1000


def test_a_dataset_has_its_own_batch_size() -> None:
    order = curriculum(dataset(train_batch_size=3), dataset("high"))
    assert order.calendar.stretches[0].length == 2 + 4
    draws = [order.draw(index) for index in range(12)]
    assert {(draw.bucket, len(draw.samples)) for draw in draws} == {(0, 3), (1, 1)}
    drawn = Counter((draw.bucket, sample) for draw in draws for sample in draw.samples)
    assert set(drawn.values()) == {2}
    assert len(drawn) == 10


@pytest.mark.parametrize(
    "windows", [({}, {}), ({"end_step": 9}, {"start_step": 5})], ids=["all", "stretches"]
)
def test_samples_are_counted_without_gaps_and_give_the_batch_again(
    windows: tuple[dict[str, int], dict[str, int]],
) -> None:
    low, high = windows
    order = curriculum(dataset(train_batch_size=3, **low), dataset("high", train_batch_size=2, **high))
    numbers = [0]
    for index in range(60):
        draw = order.draw(index)
        assert draw.first_sample == numbers[-1]
        assert order.batches_before(draw.first_sample) == index
        numbers.append(numbers[-1] + len(draw.samples))
    for number in set(range(numbers[-1])) - set(numbers):
        with pytest.raises(CheckpointError, match=f"after {number} samples, where no batch ends here"):
            order.batches_before(number)


@pytest.mark.parametrize(("size", "batches"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_the_batch_follows_from_the_samples_seen(size: int, batches: int) -> None:
    assert curriculum(dataset(), dataset("high"), batch_size=size).batches_before(12) == batches


@pytest.mark.reliability_row(8)
def test_a_batch_that_does_not_divide_the_samples_is_refused_and_those_that_do_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"12 samples.* 5 .*: 1, 2, 3, 4, 6, 12\."):
        curriculum(dataset(), batch_size=5).batches_before(12)
