"""Rows of one layer from an adapter's joined layer."""

from __future__ import annotations

import pytest
import torch

from simpletuner.helpers.adapters.files.foreign.joined import lokr_delta, take_rows
from simpletuner.helpers.adapters.files.foreign.layer_names import Target
from simpletuner.helpers.errors import AdapterError

PARTS = [Target("q", (0,), 3), Target("k", (1,), 3), Target("v", (2,), 3), Target("turned", (2, 0, 1), 3)]


@pytest.mark.parametrize("target", PARTS, ids=lambda target: target.path)
@pytest.mark.parametrize(
    ("shapes", "is_dense"),
    [
        ({"lokr_w1": (6, 4), "lokr_w2": (5, 3)}, False),
        ({"lokr_w1_a": (6, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 3)}, False),
        ({"lokr_w1": (5, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 3)}, True),
    ],
    ids=["whole", "split", "rows that do not divide"],
)
def test_rows_of_a_kronecker_product_are_those_of_its_delta(
    target: Target, shapes: dict[str, tuple[int, int]], is_dense: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    parts["alpha"] = torch.tensor(3.0)
    taken = take_rows("qkv", parts, target)
    rows = lokr_delta(parts).chunk(3)
    expected = torch.cat([rows[piece] for piece in target.pieces])
    found = taken["diff"] if is_dense else lokr_delta(taken)
    torch.testing.assert_close(found, expected)


def test_magnitudes_of_a_joined_kronecker_product_are_refused() -> None:
    parts = {"lokr_w1": torch.ones(6, 4), "lokr_w2": torch.ones(5, 3), "dora_scale": torch.ones(30, 1)}
    with pytest.raises(AdapterError, match="dora_scale"):
        take_rows("qkv", parts, PARTS[0])


def test_layer_of_its_own_keeps_parts_that_cannot_be_divided() -> None:
    parts = {"oft_blocks": torch.ones(2, 3, 3), "alpha": torch.tensor(0.0)}
    assert take_rows("a", parts, Target("a")) == parts
    with pytest.raises(AdapterError, match="oft_blocks"):
        take_rows("a", parts, PARTS[0])
