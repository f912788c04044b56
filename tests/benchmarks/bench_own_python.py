"""B12, the adapter's part: our own Python in a step, where the arithmetic is next to nothing.

    python tests/benchmarks/bench_own_python.py [--quick]

The mask of a step (set and cleared, 700 layers of one rank), and one layer's call beyond what its three
matrix products cost.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule

REPEATS = 100


def main() -> None:
    """Time 100 repetitions of each."""
    options = arguments(__doc__)
    repeats = 2 if options.quick else REPEATS
    schedule, group = RankSchedule(64), mask.new_group()
    plain, layer = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False)
    x, down, up = torch.randn(1, 8), torch.randn(8, 8), torch.randn(8, 8)
    adapted = TLoraLayer("ours", layer, 1.0, 4, 4, schedule=RankSchedule(4))
    adapted.apply_to()
    mask.set_mask(RankSchedule(4), [500])

    def products() -> None:
        for _ in range(repeats):
            torch.addmm(plain(x), x @ down, up)

    def call() -> None:
        for _ in range(repeats):
            layer(x)

    def mask_of_a_step() -> None:
        for timestep in range(repeats):
            mask.set_mask(schedule, [timestep, 500, 900, 100], group=group, hold=True)
            mask.clear_mask(group)

    contenders = {
        "three products": products,
        "an adapted layer": call,
        "mask of a step, batch 4": mask_of_a_step,
    }
    report(
        side_by_side("B12", f"{repeats} times", contenders, turns=options.turns, device=torch.device("cpu")),
        options,
    )
    mask.clear_mask()


if __name__ == "__main__":
    with torch.no_grad():
        main()
