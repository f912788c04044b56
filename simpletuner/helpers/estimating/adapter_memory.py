"""The configured adapter, as the memory model counts it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import isqrt

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models.memory_model import Layer, Layout, LowRank, Shape

Shapes = tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherAdapter(LowRank):
    """An adapter of LyCORIS that is not two factors; with bypass_mode it keeps less than is counted."""

    shapes: Callable[[Layer], Shapes]
    """Of the parameters that a layer's adapter trains."""

    def shapes_on(self, layer: Layer) -> Shapes:
        """Shapes of the parameters that a layer's adapter trains."""
        return self.shapes(layer)


def adapter_of(run: RunConfig, spec: ModelSpec, *, layout: Layout, paths: Sequence[str]) -> LowRank:
    """The adapter of a run that trains one; of a new token alone one without layers.

    Args:
        run: The run.
        spec: Its family.
        layout: Its denoiser, of any size.
        paths: Of one block of each kind. If targets are in none of them, as where they name the numbers of
            blocks, attention and feed-forward layers of all blocks count.
    """
    if not run.model.has_adapter:
        return LowRank(rank=1, is_tlora=False, adapts=lambda _: False)
    adapter = _peft(run.adapter, spec, paths) if run.lycoris is None else _lycoris(run.lycoris, spec, paths)
    layers = (layer for block in layout.blocks for layer in block.layers)
    if not any(map(adapter.adapts, layers)):
        return replace(adapter, adapts=lambda layer: layer.is_target)
    return adapter


def _peft(config: AdapterConfig, spec: ModelSpec, paths: Sequence[str]) -> LowRank:
    targets = config.peft_lora_target_modules or spec.lora_targets
    adapts = _matching([targets], paths, match=re.fullmatch) if isinstance(targets, str) else _named(targets)
    return LowRank(rank=config.lora_rank, is_tlora=False, adapts=adapts)


def _lycoris(config: LycorisConfig, spec: ModelSpec, paths: Sequence[str]) -> LowRank:
    adapts, algorithm, rank = _targeted(config, spec, paths), ALGORITHMS[config.algo], config.linear_dim
    shapes = _shapes_of(config)
    if shapes is None:
        is_tlora = algorithm.has_rank_schedule
        merges = not is_tlora and not config.extra.get("bypass_mode")
        return LowRank(rank=rank, is_tlora=is_tlora, adapts=adapts, merges=merges)
    return OtherAdapter(rank=0, is_tlora=False, adapts=adapts, merges=True, shapes=shapes)


def _shapes_of(config: LycorisConfig) -> Callable[[Layer], Shapes] | None:
    """Layer -> shapes of what an algorithm trains on it; None for two factors of the rank."""
    rank = config.linear_dim
    shapes: dict[str, Callable[[Layer], Shapes]] = {
        "full": lambda layer: layer.shapes,
        "lokr": _kronecker(config, splits=not config.extra.get("full_matrix")),
        "tlokr": _kronecker(config, splits=True),
        "loha": lambda layer: 2 * _factors(layer, rank),
        "glora": lambda layer: (*_factors(layer, rank), (layer.inputs, rank), (rank, layer.inputs)),
        "ia3": lambda layer: ((layer.outputs,),),
        "diag-oft": lambda layer: ((layer.outputs, _divided(layer.outputs, rank)[0]),),
        "boft": lambda layer: (_butterfly(layer.outputs, rank),),
    }
    return shapes.get(config.algo)


def _factors(layer: Layer, rank: int) -> Shapes:
    return (rank, layer.inputs * layer.kernel), (layer.outputs, rank)


def _kronecker(config: LycorisConfig, *, splits: bool) -> Callable[[Layer], Shapes]:
    """The small factor of a Kronecker product, at most `factor` on a side, and the large one.

    The large one is two factors of the rank, if `splits` and the rank is below half of its larger side.
    """
    rank, given = config.linear_dim, config.extra.get("factor")
    factor = given if isinstance(given, int) else -1

    def shapes(layer: Layer) -> Shapes:
        (small_out, large_out), (small_in, large_in) = (
            _divided(edge, factor) for edge in (layer.outputs, layer.inputs)
        )
        small = (small_out, small_in)
        if splits and rank < max(large_out, large_in) / 2:
            return small, (large_out, rank), (rank, large_in * layer.kernel)
        return small, (large_out, large_in, *layer.kernel_shape)

    return shapes


def _butterfly(edge: int, largest: int) -> Shape:
    """Rotations of a layer's outputs: blocks of halved edges, at most `largest`, and one for each half."""
    block, number = edge, 1
    while block > largest and block % 2 == 0:
        block, number = block // 2, number + 1
    return number, edge, block


def _named(targets: Iterable[str]) -> Callable[[Layer], bool]:
    """PEFT's names, each the end of a path; of a longer path the part in a block decides."""
    ends = tuple(targets)

    def adapts(layer: Layer) -> bool:
        path = "." + layer.name
        return any(path.endswith("." + end) or end.endswith(path) for end in ends)

    return adapts


def _matching(
    patterns: Sequence[str], paths: Sequence[str], *, match: Callable[[str, str], object]
) -> Callable[[Layer], bool]:
    """Patterns of whole paths, on the layer's path in one block of each kind."""
    return lambda layer: any(match(pattern, f"{path}.{layer.name}") for pattern in patterns for path in paths)


def _targeted(config: LycorisConfig, spec: ModelSpec, paths: Sequence[str]) -> Callable[[Layer], bool]:
    """The layers of apply_preset: those of attention or feed-forward, patterns of paths, else all of both."""
    preset = config.apply_preset
    modules = {*preset.target_module, *preset.module_algo_map}
    attention, feed_forward = (
        {name, *spec.target_aliases[name].modules} for name in ("Attention", "FeedForward")
    )
    if modules and modules <= attention:
        return lambda layer: layer.is_target and "attn" in layer.name
    if modules and modules <= feed_forward:
        return lambda layer: layer.is_target and "attn" not in layer.name
    if modules - attention - feed_forward:  # whole blocks, with the layers of their modulation
        return lambda layer: layer.is_target or layer.name.startswith("norm")
    patterns = [*preset.target_name, *preset.name_algo_map]
    if patterns and not modules:
        match = (lambda pattern, path: fnmatch(path, pattern)) if preset.use_fnmatch else re.match
        return _matching(patterns, paths, match=match)
    return lambda layer: layer.is_target


def _divided(edge: int, factor: int) -> tuple[int, int]:
    """An edge as a product: its largest divisor that is at most `factor` and its root, and the rest."""
    limit = isqrt(edge) if factor < 1 else min(factor, edge)
    small = next(number for number in range(limit, 0, -1) if edge % number == 0)
    return min(small, edge // small), max(small, edge // small)
