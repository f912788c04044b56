"""The optimiser steps at which something is due."""

from __future__ import annotations

import itertools

import pytest

from simpletuner.helpers.checkpointing.intervals import Epochs, num_due
from simpletuner.helpers.data.phases import Calendar, Stretch, even

# 3 batches in an epoch, 2 in a step: the epochs end after batches 3, 6, 9, ..., in steps 2, 3, 5, 6, 8, 9.
ACCUMULATED = Epochs(calendar=even(3), batches_per_step=2)


def due(where: Epochs, *, steps: int = 0, epochs: int = 0, last: int = 12) -> list[int]:
    return [step for step in range(last + 1) if where.is_due(step, steps=steps, epochs=epochs)]


@pytest.mark.parametrize(
    ("where", "intervals", "expected"),
    [
        (Epochs(calendar=even(4)), {"epochs": 1}, [4, 8, 12]),
        (Epochs(calendar=even(4)), {"epochs": 2}, [8]),
        (Epochs(calendar=even(4)), {"steps": 3}, [3, 6, 9, 12]),
        (Epochs(calendar=even(4)), {"steps": 3, "epochs": 1}, [3, 4, 6, 8, 9, 12]),
        (Epochs(calendar=even(4)), {}, []),
        (ACCUMULATED, {"epochs": 1}, [2, 3, 5, 6, 8, 9, 11, 12]),
        (ACCUMULATED, {"epochs": 2}, [3, 6, 9, 12]),
        (ACCUMULATED, {"epochs": 3}, [5, 9]),
        # Several epochs in a step: 2 end in each, so every third is in steps 2, 3, 5, 6, ...
        (Epochs(calendar=even(2), batches_per_step=4), {"epochs": 1, "last": 3}, [1, 2, 3]),
        (Epochs(calendar=even(2), batches_per_step=4), {"epochs": 3, "last": 7}, [2, 3, 5, 6]),
    ],
)
def test_due_after_the_steps_and_after_the_step_in_which_an_epoch_ends(
    where: Epochs, intervals: dict[str, int], expected: list[int]
) -> None:
    assert due(where, **intervals) == expected


def test_a_resumed_run_has_the_same_ends() -> None:
    for step in range(9):
        resumed = Epochs(calendar=even(3), batches_per_step=2, step=step, batches=2 * step)
        assert due(resumed, epochs=2) == due(ACCUMULATED, epochs=2)


def test_ends_are_counted_from_the_batches_before_the_run_went_on() -> None:
    # 5 steps of one batch, then steps of 2: batches 7, 9, 11, 13 are the last of steps 6, 7, 8, 9.
    resumed = Epochs(calendar=even(4), batches_per_step=2, step=5, batches=5)
    assert [step for step in due(resumed, epochs=1) if step > 5] == [7, 9, 11]
    assert resumed.completed(9) == 3


@pytest.mark.parametrize(
    "where",
    [
        ACCUMULATED,
        Epochs(calendar=even(4)),
        Epochs(calendar=even(2), batches_per_step=5),
        Epochs(calendar=even(4), batches_per_step=2, step=5, batches=9),
    ],
    ids=["accumulated", "plain", "several in a step", "resumed"],
)
def test_num_due_counts_each_step_once(where: Epochs) -> None:
    for steps, epochs, before in itertools.product((0, 1, 3, 4), (0, 1, 2, 3), (1, 2, 9, 12)):
        for after in range(where.step, before + 1):
            expected = len([step for step in due(where, steps=steps, epochs=epochs) if after < step < before])
            found = num_due(where, after=after, before=before, steps=steps, epochs=epochs)
            assert found == expected, (steps, epochs, before, after)


def test_the_end_of_an_epoch_is_the_first_step_after_which_it_is_complete() -> None:
    assert [ACCUMULATED.end_of(number) for number in range(1, 5)] == [2, 3, 5, 6]
    for number in range(1, 9):
        end = ACCUMULATED.end_of(number)
        assert ACCUMULATED.completed(end - 1) < number <= ACCUMULATED.completed(end)


def test_many_steps_take_no_time() -> None:
    huge = 2**31 - 1
    assert num_due(Epochs(), after=0, before=huge, steps=100, epochs=0) == huge // 100


def test_steps_with_fewer_batches_before_a_resume_are_in_the_first_epochs() -> None:
    stretches = (
        Stretch(start=0, epoch=0, length=10, datasets=(0,)),
        Stretch(start=40, epoch=4, length=1000, datasets=(0, 1)),
    )
    # 10 batches were drawn in 20 steps of half as many, so step 0 lies before batch 0.
    where = Epochs(calendar=Calendar(stretches), step=20, batches=10)
    found = num_due(where, after=20, before=60, steps=0, epochs=1)
    assert found == len([step for step in range(21, 60) if where.is_due(step, steps=0, epochs=1)]) == 3
