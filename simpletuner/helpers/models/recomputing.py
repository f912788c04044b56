"""Gradient checkpointing: which blocks of a denoiser are run again in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(denoiser: nn.Module, *, interval: int) -> None:
    """Keep only the inputs of some blocks for the backward pass, and run these blocks again in it.

    Gradients are the same with every interval.

    Args:
        denoiser: A model of diffusers. Its blocks are the parts that it recomputes itself: a transformer's
            blocks, and a UNet's residual blocks and the blocks of its transformers.
        interval: 1 recomputes every block, 2 every second one, from the first on, in the order of the forward
            pass.
    """
    order: dict[nn.Module, int] = {}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if order.setdefault(block, len(order)) % interval:
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    enable = denoiser.enable_gradient_checkpointing
    assert callable(enable), "every model of diffusers has it"
    if interval == 1:
        enable()
    else:
        enable(gradient_checkpointing_func=run)
