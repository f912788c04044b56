"""Arithmetic of a training step and of a forward pass, counted from the denoiser's layers. Imports no torch.

A flop is a multiplication or an addition. Layers outside the blocks, under a hundredth, are left out.
"""

from __future__ import annotations

from simpletuner.helpers.models.memory_model import Block, Layer, Layout, LowRank, Step, with_recomputing

ATTENTION_BACKWARD = 2.5
"""Flops of an attention's backward pass over its forward's: a fused kernel computes the scores again."""


def forward_flops(layout: Layout) -> int:
    """Flops of a forward pass of one sample, without an adapter."""
    return sum(block.linear_flops + block.attention_flops for block in layout.blocks)


def step_flops(layout: Layout, step: Step) -> float:
    """Flops of forward and backward of a batch."""
    blocks = with_recomputing(layout, step)
    return step.batch_size * sum(
        block_flops(block, step, num_forwards=2 if is_recomputed else 1) for block, is_recomputed in blocks
    )


def block_flops(block: Block, step: Step, *, num_forwards: int) -> float:
    """Flops of a block in forward and backward, for one sample.

    Args:
        block: The block.
        step: What is trained.
        num_forwards: 2 if the block is recomputed.
    """
    linear, attention, adapter = block.linear_flops, block.attention_flops, step.adapter
    # Forward, and the gradients of the inputs.
    total = linear * (num_forwards + 1) + attention * (num_forwards + ATTENTION_BACKWARD)
    if adapter is None:
        return total + linear  # gradients of the weights
    adapted = [layer for layer in block.layers if adapter.adapts(layer)]
    return total + sum(_adapter_flops(layer, adapter, num_forwards=num_forwards) for layer in adapted)


def _adapter_flops(layer: Layer, adapter: LowRank, *, num_forwards: int) -> float:
    if adapter.merges:  # the gradient of the merged weight is as large as the weight
        return layer.flops
    rank = adapter.rank * (2 if adapter.is_tlora else 1)
    forward = 2 * layer.rows * rank * (layer.inputs * layer.kernel + layer.outputs)
    return forward * (num_forwards + 2)
