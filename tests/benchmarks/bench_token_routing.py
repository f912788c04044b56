"""B16: forward and backward with token routing, beside every block on all tokens.

    python tests/benchmarks/bench_token_routing.py [--quick]

A Flux.1 transformer of eight blocks, 768 wide, with a LoRA of rank 16 on attention, gradient checkpointing,
and 1,024 image tokens (512 px); every block but the first two and the last routes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.configuration.schema.token_routing import TreadConfig
from simpletuner.helpers.models.token_routing import TokenRouting

NUM_TEXT = 128


def main() -> None:
    """Print one row for each share of tokens that passes by."""
    options = arguments(__doc__)
    device = torch.device(options.device)
    edge, heads = (8, 1) if options.quick else (32, 6)
    contenders: dict[str, Callable[[], None]] = {"all tokens": stepper(None, edge, heads, device)}
    for share in (0.25, 0.5, 0.75):
        contenders[f"{share:.0%} pass by"] = stepper(share, edge, heads, device)
    case = f"{edge**2} image tokens, width {128 * heads}"
    report(side_by_side("B16", case, contenders, turns=options.turns, device=device), options)


def stepper(share: float | None, edge: int, heads: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a new transformer."""
    torch.manual_seed(0)
    with device:
        transformer = FluxTransformer2DModel(
            num_layers=2, num_single_layers=6, num_attention_heads=heads, joint_attention_dim=64
        )
        inputs = {
            "hidden_states": torch.randn(1, edge**2, 64),
            "encoder_hidden_states": torch.randn(1, NUM_TEXT, 64),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.tensor([0.5]),
            "txt_ids": torch.zeros(NUM_TEXT, 3),
            "img_ids": torch.cartesian_prod(torch.zeros(1), *2 * [torch.arange(edge).float()]),
        }
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k", "to_v"]))
    transformer.enable_gradient_checkpointing()
    routing = None
    if share is not None:
        route = {"selection_ratio": share, "start_layer_idx": 2, "end_layer_idx": -2}
        routing = TokenRouting(transformer, TreadConfig.model_validate({"routes": [route]}), seed=0)

    def step() -> None:
        with nullcontext() if routing is None else routing.routed(0):
            transformer(**inputs).sample.square().mean().backward()

    return step


if __name__ == "__main__":
    main()
