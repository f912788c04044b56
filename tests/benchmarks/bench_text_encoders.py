"""B21: what a training step adds when it encodes its caption, at the real size of SDXL's text encoders.

    python tests/benchmarks/bench_text_encoders.py [--quick]

Random weights, float32, a LoRA of rank 16 on every linear layer of both encoders, one caption of 77 tokens.
Without gradients is a step after stop_text_encoder_training; a run with cached text encodes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.models.sdxl.spec import SPEC

TOKENS = 77
SIZES = ((768, 3072, 12, 12), (1280, 5120, 32, 20))
"""Width, width of the middle layer, layers and heads of both encoders."""


def main() -> None:
    """Print one row for each way to encode a caption."""
    options = arguments(__doc__)
    device = torch.device(options.device)
    sizes = ((32, 64, 2, 2), (32, 64, 2, 2)) if options.quick else SIZES
    encoders = [
        encoder(kind, size, device)
        for kind, size in zip((CLIPTextModel, CLIPTextModelWithProjection), sizes, strict=True)
    ]
    contenders: dict[str, Callable[[], None]] = {
        "without gradients": lambda: step(encoders, trains=False, recomputes=False),
        "trained": lambda: step(encoders, trains=True, recomputes=False),
        "trained, checkpointed": lambda: step(encoders, trains=True, recomputes=True),
    }
    weights = sum(weight.numel() for each in encoders for weight in each.parameters())
    trained = sum(weight.numel() for each in encoders for weight in each.parameters() if weight.requires_grad)
    case = f"{weights / 1e6:.0f} M weights, {trained / 1e6:.1f} M trained"
    report(side_by_side("B21", case, contenders, turns=options.turns, device=device), options)


def encoder(kind: type[nn.Module], size: tuple[int, int, int, int], device: torch.device) -> nn.Module:
    """A text encoder with random weights and a LoRA."""
    width, middle, layers, heads = size
    torch.manual_seed(0)
    with device:
        model = kind(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=middle,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                projection_dim=width,
            )
        )
    model.add_adapter(LoraConfig(r=16, target_modules=list(SPEC.text_encoder_lora_targets)))
    return model.train()


def step(encoders: list[nn.Module], *, trains: bool, recomputes: bool) -> None:
    """Encode one caption, and go backward through both encoders."""
    ids = torch.randint(0, 1000, (1, TOKENS), device=next(encoders[0].parameters()).device)
    for each in encoders:
        if recomputes:
            each.activation_checkpointing_enable()
        else:
            each.activation_checkpointing_disable()
        with torch.set_grad_enabled(trains):
            output = each(ids, output_hidden_states=True).hidden_states[-2].square().mean()
        if trains:
            output.backward()


if __name__ == "__main__":
    main()
