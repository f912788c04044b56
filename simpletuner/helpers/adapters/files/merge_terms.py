"""What a merge is asked for, and the files of its sum.

Shapes: R rank of a layer, n ranks of a term, I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from simpletuner.helpers.adapters.files.layouts import Layout
from simpletuner.helpers.adapters.files.low_rank import dense_delta
from simpletuner.helpers.adapters.files.rewriting import Opened
from simpletuner.helpers.adapters.tlora.stored_layer import StoredLayer


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of a merge."""

    weights: Sequence[float] = ()
    """Factor of each file's delta; 1 for all without any."""
    layout: Layout | None = None
    """By default diffusers; lycoris for a result with a rank schedule, which no other layout can hold."""
    rank: int | None = None
    """Keep this number of ranks of each layer's sum; every rank by default."""
    active_rank: int | None = None
    """Fold T-LoRA files at this active rank."""
    timestep: int | None = None
    """Fold T-LoRA files at the active rank of this timestep."""
    dtype: str = "fp32"
    """Key of DTYPES."""

    @property
    def folds(self) -> bool:
        """Whether T-LoRA files lose their rank schedule."""
        return self.active_rank is not None or self.timestep is not None


@dataclass(frozen=True, slots=True)
class Term:
    """One of the files in a sum."""

    opened: Opened
    weight: float

    def has(self, path: str) -> bool:
        """Whether it adapts a layer."""
        return path in self.opened.source.layers or path in self.opened.source.renamed

    def layer(self, path: str) -> StoredLayer:
        """Its layer, which is a LoRA or T-LoRA."""
        return self.opened.source.layers[path]

    def is_scheduled(self, path: str) -> bool:
        """Whether the active rank of its layer depends on the timestep."""
        return path in self.opened.source.layers and self.opened.changes_with_timestep(self.layer(path))

    def num_levels(self, path: str) -> int:
        """Number of its layer's ranks that the schedule opens one after the other."""
        own = self.opened.source.schedule_of(self.layer(path))
        return own.max_rank - own.min_rank

    def factors(self, path: str, options: MergeOptions) -> tuple[Tensor, Tensor]:
        """A [n, I, ...] and B [O, n] of a layer's weighted delta, float64, at its fixed rank."""
        source = self.opened.source
        layer = self.layer(path)
        rank = self._fixed_rank(layer, options)
        a, b = layer.factors_at(rank)
        return a.double(), b.double() * (layer.scale * source.gain_at(rank, layer) * self.weight)

    def dense(self, path: str, options: MergeOptions) -> Tensor:
        """A layer's weighted delta in float64."""
        renamed = self.opened.source.renamed.get(path)
        ranked = self.opened.source.ranked.get(path)
        if ranked is not None:
            renamed = self.opened.source.lokr_at(self._fixed_rank(ranked, options), path)
        if renamed is not None:
            delta = dense_delta(path, renamed, shape=self.opened.shapes.get(path)) * self.weight
        else:
            a, b = self.factors(path, options)
            delta = (b @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
        return delta

    def _fixed_rank(self, layer: StoredLayer, options: MergeOptions) -> int:
        """Ranks of a layer that are open in the sum; all of them without a schedule or a fixed rank."""
        if not self.opened.changes_with_timestep(layer):
            return layer.rank
        if options.timestep is not None:
            return self.opened.source.rank_at(options.timestep, layer)
        return layer.rank if options.active_rank is None else min(options.active_rank, layer.rank)
