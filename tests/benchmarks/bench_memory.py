"""B19: what one block of each kind keeps, at real width, against the memory model.

    python tests/benchmarks/bench_memory.py [--block "Flux.1 double"] [--quick]

Each block has random weights and runs forward and backward on the CPU. Kept are the tensors that autograd
saves, each storage once, without weights and inputs of the whole model; entering is the same with gradient
checkpointing; the peak is the most that all new tensors take, gradients and temporary ones included, and the
bound what the formula has for it. The rows "bf16, norms of a GPU" replace norms by ones that compute in
float32, as a GPU's autocast does.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from blocks import KINDS, Case, Shape, measure
from measure import machine

from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.estimating.step_memory import states_bytes
from simpletuner.helpers.models.memory_model import Arithmetic, Layout, block_bytes, working_bytes

FLOAT32 = Arithmetic(is_mixed=False, is_gpu=False)
GPU = Arithmetic(is_mixed=True, is_gpu=True)
RANK = 16
SDXL_640 = Shape(batch=1, edge=64, text=77, width=640)
SDXL_1280 = Shape(batch=1, edge=32, text=77, width=1280)
SDXL_320 = Shape(batch=1, edge=64, text=77, width=320)
WIDE = Shape(batch=1, edge=16, text=512, width=3072, head=128)
DEV = replace(WIDE, width=6144)
REAL = {
    "SDXL residual": (SDXL_320,),
    "SDXL transformer": (SDXL_640, SDXL_1280),
    "Flux.1 double": (WIDE,),
    "Flux.1 single": (WIDE,),
    "Flux.2 double": (WIDE, DEV),
    "Flux.2 single": (WIDE, DEV),
}
COLUMNS = (
    *("block", "width", "trained", "format", "B x (N + L)", "weights", "gradients", "states"),
    *("kept", "formula", "error", "entering", "peak", "bound"),
)
MIB = 2**20
LARGEST_WHOLE = 2**31
"""Bytes of weights up to which a whole block is trained."""


def main() -> None:
    """Print one row for each block, training and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--block", choices=REAL, help="only this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for case in cases(is_quick=options.quick):
        if options.block in (None, case.kind):
            print(row(case), flush=True)


def cases(*, is_quick: bool) -> list[Case]:
    """Two sizes in float32, and one with the formats of a GPU, of each block and training."""
    found = []
    for kind, shapes in REAL.items():
        for shape in (Shape(batch=1, edge=6, text=8, width=128),) if is_quick else shapes:
            smaller = replace(shape, batch=2, edge=shape.edge // 2)
            is_large = KINDS[kind].block(shape).num_weights * 4 > LARGEST_WHOLE
            for training in ("tlora",) if is_large else ("whole", "tlora"):
                if kind == "SDXL residual" and training == "tlora":
                    continue
                sizes = ((shape, GPU),) if is_large else ((shape, FLOAT32), (smaller, FLOAT32), (shape, GPU))
                found += [Case(kind, each, training, arithmetic, RANK) for each, arithmetic in sizes]
    return found


def row(case: Case) -> str:
    """One block in MiB."""
    measured, block = measure(case, with_peak=True, with_states=True), KINDS[case.kind].block(case.shape)
    formula = block_bytes(block, case.step)
    bound = formula + measured.gradients + working_bytes(Layout((block,), ()), case.step)
    entering = case.shape.batch * block.input_numbers * case.arithmetic.compute_bytes
    assert block.num_weights * case.arithmetic.compute_bytes == measured.weights
    assert entering == measured.entering
    if not case.arithmetic.is_mixed:
        assert states_bytes(Counter(measured.trained), OptimizerConfig()) == measured.states
    text = "" if case.kind == "SDXL residual" else f" + {case.shape.text}"
    sizes = (measured.weights, measured.gradients, measured.states, measured.kept, formula)
    return " | ".join(
        (
            f"| {case.kind} | {case.shape.width}",
            {"whole": "all weights", "tlora": f"T-LoRA {case.rank}"}[case.training],
            "bf16, norms of a GPU" if case.arithmetic.is_mixed else "float32",
            f"{case.shape.batch} x ({case.shape.image}{text})",
            *(f"{size / MIB:.1f}" for size in sizes),
            f"{formula / measured.kept - 1:+.2%}",
            f"{measured.entering / MIB:.1f} | {measured.peak / MIB:.1f} | {bound / MIB:.1f} |",
        )
    )


if __name__ == "__main__":
    main()
