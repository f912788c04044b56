"""B14: each optimiser's state for Flux.1's T-LoRA of rank 64, and the time of its step, beside fused AdamW.

    python tests/benchmarks/bench_optimizers.py [--quick]

The shapes are those of the adapter on a transformer without memory. A state is made and counted for one
parameter of each shape, and counted for all parameters of it. A step is one over the parameters of one double
and one single block. --quick does not let torchao compile its steps, which takes minutes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, machine, side_by_side
from models import flux

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.trainable import one_group
from simpletuner.helpers.checkpointing.optimizer_state import num_state_bytes
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.models.flux.spec import SPEC
from simpletuner.helpers.training.optimizers import build_optimizer

Shape = tuple[int, ...]
PRESET = {"target_module": ["Attention", "FeedForward"]}


def main() -> None:
    """Print one row for each optimiser."""
    options = arguments(__doc__)
    shapes, block_shapes = adapter_shapes(rank=4 if options.quick else 64)
    total = sum(count * torch.Size(shape).numel() for shape, count in shapes.items())
    names = list(OPTIMIZERS)
    with torch.compiler.set_stance("force_eager"):
        sizes = {name: state_bytes(name, shapes) for name in names}
    steps = {name: stepper(name, list(block_shapes.elements())) for name in names}
    with torch.compiler.set_stance("force_eager" if options.quick else "default"):
        times = side_by_side("B14", "", steps, turns=options.turns, device=torch.device(options.device))
    print(
        f"{machine()}; {options.turns} turns\n\n{total / 1e6:.1f} M parameters in {shapes.total()} tensors\n"
    )
    print("| optimizer | state, MiB | share of AdamW's | step, ratio | quartiles |\n|---|---|---|---|---|")
    for name, time in zip(names, times, strict=True):
        share, spread = sizes[name] / sizes["adamw"], f"{time.low:.2f}-{time.high:.2f}"
        print(f"| `{name}` | {sizes[name] / 2**20:.0f} | {share:.3f} | {time.ratio:.2f} | {spread} |")


def adapter_shapes(*, rank: int) -> tuple[Counter[Shape], Counter[Shape]]:
    """Shape -> number of trained parameters, of the whole adapter and of one double and one single block."""
    config = LycorisConfig.model_validate(
        {
            "algo": "tlora",
            "multiplier": 1.0,
            "linear_dim": rank,
            "linear_alpha": float(rank),
            "apply_preset": PRESET,
        }
    )
    adapter = LycorisAdapter.create(flux(), config, spec=SPEC, seed=0)
    every: Counter[Shape] = Counter()
    blocks: Counter[Shape] = Counter()
    for name, weight in adapter.network.named_parameters():
        if weight.requires_grad:
            every[tuple(weight.shape)] += 1
            blocks[tuple(weight.shape)] += "transformer_blocks_0_" in name
    return every, +blocks


def with_gradients(shapes: list[Shape]) -> list[nn.Parameter]:
    """Parameters of these shapes with a gradient each."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return parameters


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimiser as a run builds it."""
    return build_optimizer(one_group("adapter", parameters), OptimizerConfig(optimizer=name))


def state_bytes(name: str, shapes: Counter[Shape]) -> int:
    """Bytes of the state of all parameters after a step."""
    total = 0
    for shape, count in shapes.items():
        optimizer = optimizer_of(name, with_gradients([shape]))
        optimizer.step()
        total += count * num_state_bytes(optimizer)
    return total


def stepper(name: str, shapes: list[Shape]) -> Callable[[], None]:
    """A step over parameters of these shapes; side_by_side takes the first, which makes the state."""
    optimizer = optimizer_of(name, with_gradients(shapes))

    def step() -> None:
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
