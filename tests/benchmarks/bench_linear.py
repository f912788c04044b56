"""B1: forward and backward of one adapted linear layer against the frozen one.

    python tests/benchmarks/bench_linear.py [--quick]

Contenders: ours with a shared timestep (500) and with one per sample, PEFT LoRA of rank R and 2R, LyCORIS's
T-LoRA in its default and bypass mode (one mask for the batch: it has none per sample). Setting the mask is
timed too; over a model it is shared by all layers.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, set_timestep_mask
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import Result, arguments, report, side_by_side

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule

SHAPES = [(640, 640), (1280, 1280), (3072, 3072), (3072, 12288)]
RANKS = [4, 16, 64]
TIMESTEPS = [900, 100, 500, 300]


class Holder(nn.Module):
    """PEFT adapts the layers of a model, not a bare layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def main() -> None:
    """Every width at rank 64, then the other ranks at 3072; 1,024 tokens in a batch of four samples."""
    options = arguments(__doc__)
    cases = [(shape, 64, 4) for shape in SHAPES] + [(SHAPES[2], rank, 4) for rank in RANKS[:2]]
    tokens = 1024
    if options.quick:
        cases, tokens = [((64, 64), 8, 4)], 16
    results: list[Result] = []
    for shape, rank, batch in cases:
        results += bench(shape, rank, batch=batch, tokens=tokens // batch, options=options)
    report(results, options)


def bench(
    shape: tuple[int, int], rank: int, *, batch: int, tokens: int, options: argparse.Namespace
) -> list[Result]:
    """All contenders on one layer; `tokens` a sample."""
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    columns, rows = shape
    torch.manual_seed(0)
    base = nn.Linear(columns, rows).to(device, dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, columns, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(batch, tokens, rows, device=device, dtype=dtype)

    def step(layer: nn.Module) -> None:
        layer(x).backward(weight)
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    def ours(timesteps: list[int]) -> Callable[[], None]:
        layer = copy.deepcopy(base)
        schedule = RankSchedule(rank)
        TLoraLayer("ours", layer, 1.0, rank, rank, schedule=schedule).apply_to()

        def run() -> None:
            mask.set_mask(schedule, timesteps, device=device)
            step(layer)
            mask.clear_mask()

        return run

    def peft(lora_rank: int) -> Callable[[], None]:
        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=["layer"])
        model = inject_adapter_in_model(config, Holder(copy.deepcopy(base))).to(device)
        return lambda: step(model)

    def stock(bypass: bool) -> Callable[[], None]:
        layer = copy.deepcopy(base)
        module = TLoraModule("stock", layer, 1.0, rank, rank, bypass_mode=bypass).to(device)
        module.apply_to()  # by replacing the layer's forward

        def run() -> None:
            set_timestep_mask(RankSchedule(rank).mask([500]).to(device), 0)
            step(layer)
            clear_timestep_mask(0)

        return run

    contenders = {
        "frozen linear": lambda: step(base),
        "T-LoRA, shared t=500": ours([500] * batch),
        "T-LoRA, mixed t": ours(TIMESTEPS),
        f"PEFT LoRA rank {rank}": peft(rank),
        f"PEFT LoRA rank {2 * rank}": peft(2 * rank),
    }
    if columns == rows:  # LyCORIS decomposes the weight when it is created, which takes minutes at 3072x12288
        contenders |= {"LyCORIS tlora, default": stock(False), "LyCORIS tlora, bypass": stock(True)}
    case = f"{columns}->{rows}, rank {rank}, {batch} x {tokens} tokens"
    return side_by_side("B1", case, contenders, turns=options.turns, device=device)


if __name__ == "__main__":
    main()
