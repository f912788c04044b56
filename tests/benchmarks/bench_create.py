"""B4: create every adapter of SDXL (attention) and Flux.1, random/last, rank 64.

    python tests/benchmarks/bench_create.py [--quick]

LyCORIS's own layer is measured once for each shape and counted for all layers of it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import torch
from lycoris.modules.tlora import TLoraModule
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, machine
from models import flux, sdxl

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.flux.spec import SPEC as FLUX
from simpletuner.helpers.models.sdxl.spec import SPEC as SDXL

BLOCKS = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
TARGETS = {
    "SDXL, attention": (sdxl, {"target_module": ["Attention"]}, SDXL),
    "Flux.1, attention and feed-forward": (flux, {"target_module": ["Attention", "FeedForward"]}, FLUX),
    "Flux.1, blocks": (flux, {"target_module": BLOCKS}, FLUX),
}


def main() -> None:
    """Print one row for each model."""
    options = arguments(__doc__)
    rank = 4 if options.quick else 64
    print(
        f"{machine()}; CPU time\n\n| model | layers | ours, s | LyCORIS, s | ratio |\n|---|---|---|---|---|"
    )
    for name, (make, preset, spec) in list(TARGETS.items())[: 1 if options.quick else None]:
        config = LycorisConfig.model_validate(
            {
                "algo": "tlora",
                "multiplier": 1.0,
                "linear_dim": rank,
                "linear_alpha": float(rank),
                "apply_preset": preset,
            }
        )
        model = make()
        began_s = time.process_time()
        adapter = LycorisAdapter.create(model, config, spec=spec, seed=0)
        ours_s = time.process_time() - began_s
        shapes = Counter(tuple(module.org_module[0].weight.shape) for module in adapter.network.loras)
        if options.quick:
            print(f"| {name} | {adapter.num_layers} | {ours_s:.2f} | - | - |")
            continue
        stock_s = sum(count * stock_seconds(shape) for shape, count in shapes.items())
        print(f"| {name} | {adapter.num_layers} | {ours_s:.2f} | {stock_s:.0f} | {stock_s / ours_s:.0f} |")


def stock_seconds(shape: tuple[int, int]) -> float:
    """CPU time of LyCORIS's layer on one weight of this shape, its decomposition included."""
    rows, columns = shape
    layer = nn.Linear(columns, rows, bias=False)
    began_s = time.process_time()
    TLoraModule("stock", layer, 1.0, 64, 64)
    return time.process_time() - began_s


if __name__ == "__main__":
    with torch.no_grad():
        main()
