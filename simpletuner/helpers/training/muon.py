"""Muon for matrices and AdamW for all other parameters, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Trains matrices with torch's Muon, and vectors and convolutions with AdamW.

    Both take the same learning rate and weight decay: Muon's step is scaled to the size of AdamW's, 0.2 in
    the root mean square of its entries.

    Source: Muon is Scalable for LLM Training, arXiv:2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Sequence[Mapping[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        matrices = [_part(group, matrices=True) for group in params]
        others = [_part(group, matrices=False) for group in params]
        self.parts: tuple[Optimizer, Optimizer] = (
            torch.optim.Muon(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        )
        # The parts have filled their groups with their defaults.
        super().__init__([*matrices, *others], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; a closure computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        half = len(self.param_groups) // 2
        for part, groups in zip(
            self.parts, (self.param_groups[:half], self.param_groups[half:]), strict=True
        ):
            # Shared with the whole, so that a checkpoint holds one state and a schedule sets one rate.
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss


def _part(group: Mapping[str, Any], *, matrices: bool) -> dict[str, Any]:
    """The group with its matrices alone, or with all other parameters."""
    return {**group, "params": [each for each in group["params"] if (each.ndim == 2) == matrices]}
