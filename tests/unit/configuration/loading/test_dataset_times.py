"""The steps and epochs in which datasets take part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.loading.dataset_times import gaps

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize(
    ("windows", "last", "expected"),
    [
        ([(1, None)], 10, []),
        ([(0, None)], None, []),
        ([(1, 4), (5, None)], 10, []),
        ([(5, None), (1, 4)], None, []),
        ([(1, 4), (7, None)], 10, [(5, 6)]),
        ([(3, 4), (2, 8)], 10, [(1, 1), (9, 10)]),
        ([(3, 4), (2, 8)], None, [(1, 1)]),
        ([(1, 4), (20, 30)], 10, [(5, 10)]),
        ([(1, 4), (2, 3), (6, 9)], 7, [(5, 5)]),
    ],
)
def test_gaps_between_windows(
    windows: list[tuple[int, int | None]], last: int | None, expected: list[tuple[int, int]]
) -> None:
    assert gaps(windows, last=last) == expected


def entry(name: str, **keys: object) -> dict[str, object]:
    return {"id": name, "instance_data_dir": "images", **keys}


def test_the_window_of_a_dataset_is_read(workspace: Workspace) -> None:
    workspace.datasets = [
        entry("low", end_step="300", end_epoch=0),
        entry("high", start_step=301, start_epoch=2, end_epoch=9),
        entry("always", start_step=0),
    ]
    low, high, always = workspace.load(max_train_steps=500).datasets
    assert (low.start_step, low.end_step, low.start_epoch, low.end_epoch) == (1, 300, 1, None)
    assert (high.start_step, high.end_step, high.start_epoch, high.end_epoch) == (301, None, 2, 9)
    assert (always.start_step, always.end_step) == (0, None)


def test_steps_without_a_dataset_are_named_all_at_once(workspace: Workspace) -> None:
    message = workspace.dataset_problems(
        entry("low", start_step=2, end_step=300), entry("high", start_step=400), number=2, max_train_steps=500
    )
    assert "no dataset takes part in step 1. Set start_step" in message
    assert "no dataset takes part in steps 301 to 399. Set start_step or end_step" in message


def test_epochs_without_a_dataset_are_named(workspace: Workspace) -> None:
    message = workspace.dataset_problems(entry("low", end_epoch=2), max_train_steps=0, num_train_epochs=4)
    assert "no dataset takes part in epochs 3 to 4" in message


def test_epochs_of_a_run_of_steps_may_end_with_the_last_dataset(workspace: Workspace) -> None:
    workspace.datasets = [entry("low", end_epoch=2)]
    workspace.load(max_train_steps=10, num_train_epochs=5)


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_dataset_begins_before_it_ends(workspace: Workspace, unit: str) -> None:
    message = workspace.dataset_problems(
        entry("low", **{f"start_{unit}": 9, f"end_{unit}": 8}), entry("high")
    )
    assert f"low.end_{unit}" in message
    assert f"8 is before start_{unit} 9" in message


@pytest.mark.parametrize("value", [-1, 1.5, "soon", True])
def test_a_window_is_made_of_whole_numbers(workspace: Workspace, value: object) -> None:
    assert "low.start_step" in workspace.dataset_problems(entry("low", start_step=value), entry("high"))


def test_a_dataset_may_have_a_batch_size_of_its_own_but_for_a_slider(workspace: Workspace) -> None:
    workspace.datasets = [entry("low", train_batch_size="8"), entry("high", train_batch_size=0)]
    assert [each.train_batch_size for each in workspace.load().datasets] == [8, None]
    message = workspace.dataset_problems(entry("low", train_batch_size=8, slider_strength=1), entry("high"))
    assert "low.train_batch_size" in message
    assert "the datasets of a slider share one" in message
