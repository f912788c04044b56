"""How many CPU threads a run computes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from simpletuner.helpers.training.build import SMALL_MODEL, limit_cpu_threads


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model(num_weights: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(num_weights, 1, bias=False)


@pytest.mark.parametrize(
    ("num_weights", "device", "omp", "threads"),
    [
        (100, "cpu", None, 1),
        (SMALL_MODEL, "cpu", None, 2),
        (100, "cuda", None, 2),
        (100, "cpu", "2", 2),
    ],
)
def test_a_small_model_is_computed_on_one_thread_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, num_weights: int, device: str, omp: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    limit_cpu_threads(model(num_weights), torch.device(device))
    assert torch.get_num_threads() == threads
