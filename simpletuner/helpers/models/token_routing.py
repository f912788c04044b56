"""Token routing: in training, a share of the image tokens passes some blocks of a transformer by.

Source: Krause et al., arXiv:2501.04765 (TREAD).

Shapes: B batch, N image tokens, K of them that take the blocks, L text tokens, D width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.noising import generator_of

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.configuration.schema.token_routing import TreadConfig


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks of one route: the first and the last of them, counted from 0."""

    start: int
    end: int
    share: float
    """Share of the image tokens that passes them by."""


class TokenRouting:
    """Routes of a transformer's image tokens, through hooks on its blocks; they act within `routed` only.

    The blocks of a route get the same K random tokens, in their order, with their positions. After its last
    block these tokens return to their places among the N - K others, which come as they were before the first
    block. Text tokens take every block.
    """

    def __init__(self, transformer: nn.Module, config: TreadConfig, *, seed: int) -> None:
        """Put the hooks on.

        Args:
            transformer: A model of diffusers with blocks for two streams, then blocks for one.
            config: Its routes.
            seed: Seed of the run, from which the choice of tokens derives.

        Raises:
            ModelError: A route leaves the transformer, or two routes share a block.
        """
        blocks: list[Any] = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]  # type: ignore[misc]  # modules
        self._micro_batch = MicroBatch(seed)
        blocks[0].register_forward_pre_hook(self._count_text, with_kwargs=True)
        for span in spans_of(config, num_blocks=len(blocks)):
            Route(span, blocks[span.start : span.end + 1], self._micro_batch)

    @contextmanager
    def routed(self, sample_index: int) -> Iterator[None]:
        """Route the tokens of forward and backward pass of a micro-batch whose first sample has this index.

        Gradient checkpointing runs blocks again in the backward pass, so it belongs into the context.
        """
        self._micro_batch.begin(sample_index)
        try:
            yield
        finally:
            self._micro_batch.end()

    def _count_text(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._micro_batch.note_text(_bound(block, args, kwargs)["encoder_hidden_states"])


@dataclass(slots=True)
class MicroBatch:
    """The micro-batch whose tokens are routed now."""

    seed: int
    sample_index: int | None = None
    """Index of its first sample; None while nothing is routed."""
    num_text: int = 0
    tokens: dict[Span, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of each route, [K] the indices of the tokens that take its blocks, and [B, N, D] the tokens before."""

    def begin(self, sample_index: int) -> None:
        """Route from now on."""
        self.sample_index = sample_index

    def end(self) -> None:
        """Route no more."""
        self.sample_index = None
        self.tokens.clear()

    def note_text(self, text: Tensor) -> None:
        """Count the text tokens, [B, L, D], of the forward pass that begins."""
        self.num_text = text.shape[1]


class Route:
    """The hooks of one route."""

    def __init__(self, span: Span, blocks: Sequence[nn.Module], micro_batch: MicroBatch) -> None:
        self._span, self._first, self._micro_batch = span, blocks[0], micro_batch
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[-1].register_forward_hook(self._leave)

    def _enter(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The inputs of a block, with K image tokens and their positions."""
        if self._micro_batch.sample_index is None:
            return None
        inputs, num_text = _bound(block, args, kwargs), self._micro_batch.num_text
        if block is self._first:
            inputs["hidden_states"] = self._reduced(inputs)
        kept, _ = self._micro_batch.tokens[self._span]
        # Positions and attention mask are those of all text tokens, then all image tokens.
        rows = torch.cat([torch.arange(num_text, device=kept.device), num_text + kept])  # [L + K]
        inputs["image_rotary_emb"] = tuple(each[rows] for each in inputs["image_rotary_emb"])
        attention = inputs.get("joint_attention_kwargs") or {}
        if "attention_mask" in attention:
            attention = {**attention, "attention_mask": attention["attention_mask"][..., rows]}
        inputs["joint_attention_kwargs"] = attention
        return (), inputs

    def _reduced(self, inputs: Mapping[str, Any]) -> Tensor:
        """Choose K image tokens and remember all N; the tokens for the first block."""
        tokens, num_text = inputs["hidden_states"], self._micro_batch.num_text
        is_joined = inputs["encoder_hidden_states"] is None
        text, full = (tokens[:, :num_text], tokens[:, num_text:]) if is_joined else (tokens[:, :0], tokens)
        kept = self._choose(full.shape[1]).to(full.device)
        self._micro_batch.tokens[self._span] = (kept, full)
        return torch.cat([text, full[:, kept]], dim=1)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output of the last block, with all N image tokens."""
        if self._micro_batch.sample_index is None:
            return None
        kept, full = self._micro_batch.tokens[self._span]
        if not isinstance(output, Tensor):
            text, tokens = output
            return text, full.index_copy(1, kept, tokens)
        text, tokens = output[:, : self._micro_batch.num_text], output[:, self._micro_batch.num_text :]
        return torch.cat([text, full.index_copy(1, kept, tokens)], dim=1)

    def _choose(self, num_tokens: int) -> Tensor:
        """[K] ascending indices of the image tokens that take the blocks; at least one."""
        assert self._micro_batch.sample_index is not None, "tokens are routed within a micro-batch"
        purpose = f"route {self._span.start}"
        generator = generator_of(self._micro_batch.seed, purpose, self._micro_batch.sample_index)
        num_kept = max(1, round(num_tokens * (1 - self._span.share)))
        return torch.randperm(num_tokens, generator=generator)[:num_kept].sort().values


def spans_of(config: TreadConfig, *, num_blocks: int) -> list[Span]:
    """The blocks of each route of a transformer with num_blocks, in order.

    Raises:
        ModelError: A route leaves the transformer, ends before it starts, or shares a block with another.
    """
    spans = []
    for number, route in enumerate(config.routes):
        start, end = (
            index + num_blocks if index < 0 else index
            for index in (route.start_layer_idx, route.end_layer_idx)
        )
        if not 0 <= start <= end < num_blocks:
            raise ModelError(
                f"tread_config: route {number} leads from block {route.start_layer_idx} to "
                f"{route.end_layer_idx}. The transformer has {num_blocks} blocks, 0 to {num_blocks - 1}, or "
                f"{-num_blocks} to -1 from the end; a route ends after its start."
            )
        spans.append(Span(start, end, share=route.selection_ratio))
    spans.sort(key=lambda each: each.start)
    for before, after in itertools.pairwise(spans):
        if after.start <= before.end:
            raise ModelError(
                f"tread_config: two routes share block {after.start}. The transformer has {num_blocks} "
                "blocks; let one route end before the next starts."
            )
    return spans


def _bound(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a block by name; gradient checkpointing passes them by position."""
    return dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
