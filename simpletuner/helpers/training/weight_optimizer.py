"""Optimiser steps of whole models: in float32, rounded stochastically to bf16, and in the backward pass.

    rounded(x) = the bf16 number below x, or the next one above, with the probability that makes x the mean

So updates below half a spacing of bf16 numbers, 1/512 of the weight or more, are kept on average; rounding to
the nearest loses all of them. Source: Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from simpletuner.helpers.adapters.sharding import own_part
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.randomness import mix
from simpletuner.helpers.training.optimizers import move_state

if TYPE_CHECKING:
    from torch import Tensor, nn

    from simpletuner.helpers.checkpointing.progress import Progress
    from simpletuner.helpers.configuration.schema.sections import RunConfig

_DROPPED_BITS = 16
"""Bits of a float32's mantissa that bf16 lacks."""


def rounded_stochastically(value: Tensor, *, generator: torch.Generator) -> Tensor:
    """A finite float32 tensor as bf16, each element up or down so that its mean is the element."""
    bits = value.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << _DROPPED_BITS, generator=generator)
    kept = (bits + noise).bitwise_and_(-(1 << _DROPPED_BITS))
    return kept.view(torch.float32).to(torch.bfloat16)


class WeightOptimizer(Optimizer):
    """Steps the weights of a model one parameter group at a time.

    A bf16 weight and its gradient are float32 during its step, so the state of the optimiser is too, and the
    result is rounded stochastically. The rounding depends on the seed, the step and the weight alone; of a
    sharded weight each process rounds its part.

    Args:
        inner: The optimiser of the weights. Where its step needs no other gradients, each weight should be a
            group, so that one at a time is float32.
        seed: Of the rounding.
        step: Returns the number of steps taken so far.
        at_once: Step all groups together.
        in_backward: Step a weight as soon as its gradient is complete, and free the gradient. `step` then
            takes none.
        bound: Largest absolute element of a gradient in the backward pass; None for any.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        seed: int,
        step: Callable[[], int],
        at_once: bool = False,
        in_backward: bool = False,
        bound: float | None = None,
    ) -> None:
        # The groups are the same objects, for one learning rate.
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.state = inner, inner.state
        self.seed, self.num_steps = seed, step
        self.in_backward, self.bound = in_backward, bound
        self._parts = [self.param_groups] if at_once else [[group] for group in self.param_groups]
        self._squares: list[Tensor] = []
        weights: list[nn.Parameter] = [weight for group in self.param_groups for weight in group["params"]]
        self._index = {weight: index for index, weight in enumerate(weights)}
        self._generators: dict[torch.device, torch.Generator] = {}
        if in_backward:
            assert not at_once, "a step in the backward pass needs no other gradients"
            for part in self._parts:
                self._step_in_backward(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None, "the gradients are there already"
        for part in self._parts:
            self._step_part(part)

    def gradient_norm(self) -> Tensor:
        """Norm of the gradients that the backward pass stepped with since the last call, a scalar."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def _step_in_backward(self, part: Sequence[dict[str, Any]]) -> None:
        (weight,) = part[0]["params"]

        @torch.no_grad()
        def step_now(weight: Tensor) -> None:
            assert weight.grad is not None, "the hook runs when the gradient is complete"
            self._squares.append(torch.linalg.vector_norm(weight.grad, dtype=torch.float32).square())
            if self.bound is not None:
                weight.grad.clamp_(-self.bound, self.bound)
            self._step_part(part)
            weight.grad = None

        weight.register_post_accumulate_grad_hook(step_now)

    def _step_part(self, part: Sequence[dict[str, Any]]) -> None:
        weights = [weight for group in part for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        copies = {weight: _in_float32(weight) for weight in weights if weight.dtype == torch.bfloat16}
        move_state(self.state, copies)
        groups, self.inner.param_groups = self.inner.param_groups, list(part)
        own = [group["params"] for group in part]
        for group in part:
            group["params"] = [copies.get(weight, weight) for weight in group["params"]]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
            for group, params in zip(part, own, strict=True):
                group["params"] = params
            move_state(self.state, {copy: weight for weight, copy in copies.items()})
        for weight, copy in copies.items():
            rounded = rounded_stochastically(own_part(copy.detach()), generator=self._generator(weight))
            own_part(weight.detach()).copy_(rounded)

    def _generator(self, weight: nn.Parameter) -> torch.Generator:
        device = weight.device
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(mix(self.seed, "rounding", self.num_steps(), self._index[weight]))


def _in_float32(weight: nn.Parameter) -> nn.Parameter:
    """A float32 copy of a weight, which takes its gradient.

    The weight itself cannot become float32: torch would drop its gradient accumulator, on which DDP has the
    hook that averages the gradients of the processes.
    """
    copy = torch.nn.Parameter(weight.detach().float())
    assert weight.grad is not None, "only weights with a gradient are stepped"
    copy.grad, weight.grad = weight.grad.float(), None
    return copy


def steps_one_by_one(config: RunConfig) -> bool:
    """Whether each weight of a whole model is a parameter group of its own, which is stepped alone."""
    return config.model.is_full and not OPTIMIZERS[config.optimizer.optimizer].needs_all_gradients


def build_weight_optimizer(config: RunConfig, inner: Optimizer, progress: Progress) -> WeightOptimizer | None:
    """What steps the weights of model_type full; None for float32 weights and for adapters."""
    is_rounded, in_backward = config.precision.mixed_precision != "no", config.whole_model.fused_backward_pass
    if not config.model.is_full or not (is_rounded or in_backward):
        return None
    training = config.training
    return WeightOptimizer(
        inner,
        seed=training.seed,
        step=lambda: progress.step,
        at_once=not steps_one_by_one(config),
        in_backward=in_backward,
        bound=training.max_grad_norm or None,
    )
