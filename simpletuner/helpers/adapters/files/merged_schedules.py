"""Merge files with a rank schedule to one that opens the same ranks at every timestep.

A schedule opens m + floor(s (R - m)) ranks, where s is the timestep's share (or a rounding of its kind). With
n ranks in front that are always open, R + n and m + n give n more at every timestep: exact. k files of one
schedule would need k (m + floor(s (R - m))) ranks, and k R and k m give k m + floor(k s (R - m)), up to k - 1
more: no schedule opens two ranks at one step. But a rank with base factors is the difference of two products,
so it holds one rank of each of two files of init `vanilla`: one trained, one as base with its sign turned.

Shapes: R rank, I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file, labels
from simpletuner.helpers.adapters.files.adapter_file import layer_name
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer, relative_error
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions, Term
from simpletuner.helpers.adapters.files.rewriting import Rewritten
from simpletuner.helpers.adapters.tlora.delta import product_norm
from simpletuner.helpers.adapters.tlora.rank_schedule import ROUNDED, RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import (
    BASE_KEYS,
    TRAINED_KEYS,
    VANILLA_KEYS,
    StoredLayer,
)
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable

FOLD = "Give --active-rank or --timestep, which fold the files to a LoRA with that rank at every timestep"


@dataclass(frozen=True, slots=True)
class _Products:
    """Products p_i lambda_i q_i, one for each rank."""

    q: Tensor  # [R, I, ...]
    p: Tensor  # [O, R]
    values: Tensor  # [R]

    @property
    def rank(self) -> int:
        """R."""
        return self.values.numel()

    def behind(self, front: _Products) -> _Products:
        """The ranks of `front`, then these."""
        return _Products(
            torch.cat([front.q, self.q]),
            torch.cat([front.p, self.p], dim=1),
            torch.cat([front.values, self.values]),
        )

    def zeros(self, rank: int) -> _Products:
        """Products of this size that are zero."""
        return _Products(
            self.q.new_zeros(rank, *self.q.shape[1:]),
            self.p.new_zeros(self.p.shape[0], rank),
            self.values.new_zeros(rank),
        )


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum of one layer's deltas."""

    front: _Products | None
    """Ranks that are always open; None for none."""
    trained: _Products | None = None
    """Ranks that a schedule opens; None for none."""
    base: _Products | None = None
    """Ranks of the same number that are subtracted; None for init vanilla."""
    scale: float = 1.0
    """Of all products."""
    num_levels: int = 0
    """Number of `trained`'s last ranks that the schedule opens one after the other."""

    @property
    def num_always_open(self) -> int:
        """Ranks that are active at every timestep."""
        front = 0 if self.front is None else self.front.rank
        return front if self.trained is None else front + self.trained.rank - self.num_levels


def write(
    target: Path, terms: Sequence[Term], options: MergeOptions, *, metadata: Mapping[str, str]
) -> Rewritten:
    """Write the sum of files, some with a rank schedule, as a T-LoRA in LyCORIS's layout.

    Raises:
        AdapterError: No rank schedule opens the same ranks, or an option belongs to a LoRA.
        StorageError: The file cannot be written.
    """
    _check_options(options)
    schedule = _common_schedule(terms)
    paths = list(dict.fromkeys(path for term in terms for path in term.opened.paths))
    sums = {path: _sum_of(path, [term for term in terms if term.has(path)], options) for path in paths}
    scheduled = {path: each for path, each in sums.items() if each.trained is not None}
    # A layer of another rank follows the schedule of its own rank, so that all layers have one minimum.
    always_open = max(each.num_always_open for each in scheduled.values())
    most_levels = max(each.num_levels for each in scheduled.values())
    if schedule.variant in ROUNDED:
        _refuse_other_gain(scheduled, always_open=always_open, variant=schedule.variant)
    merged = replace(schedule, max_rank=always_open + most_levels, min_rank=always_open)
    tensors: dict[str, Tensor] = {}
    layers = []
    for path, each in sums.items():
        parts = _parts(each, merged)
        tensors |= {f"{layer_name(path)}.{part}": tensor for part, tensor in parts.items()}
        live = [term.factors(path, options) for term in terms if term.has(path)]
        layers.append(_measured(path, StoredLayer.read(layer_name(path), parts), live=live))
    header = {
        **metadata,
        adapter_file.SCHEDULE_KEY: json.dumps(merged.config()),
        adapter_file.PATHS_KEY: json.dumps({layer_name(path): path for path in sums}),
        **labels.labels_of_tlora(
            metadata, ranks=[layer.rank for layer in layers], alphas=[layer.alpha for layer in layers]
        ),
    }
    adapter_file.write(target, tensors, metadata=header)
    return Rewritten(target, layers, "T-LoRA that opens the same ranks at every timestep")


def _check_options(options: MergeOptions) -> None:
    lost = {
        f"format {options.layout}": options.layout not in (None, "lycoris"),
        f"rank {options.rank}": options.rank is not None,
        f"dtype {options.dtype}": options.dtype != "fp32",
    }
    found = [name for name, is_set in lost.items() if is_set]
    if found:
        raise AdapterError(
            f"{', '.join(found)}: a rank schedule is kept in layout lycoris, with every rank, in fp32. Omit "
            f"it. {FOLD}."
        )


def _common_schedule(terms: Sequence[Term]) -> RankSchedule:
    """The schedule of the files that have one; its ranks are those of the first."""
    schedules = {
        printable(str(term.opened.file)): term.opened.source.schedule
        for term in terms
        if term.opened.scheduled
    }
    kinds = {(each.variant, each.alpha, each.num_timesteps) for each in schedules.values()}
    if len(kinds) > 1:
        found = "; ".join(
            f"{name} has {each.variant}, alpha {each.alpha:g}, {each.num_timesteps} timesteps"
            for name, each in schedules.items()
        )
        raise AdapterError(f"The rank schedules differ: {found}. {FOLD}.")
    return next(iter(schedules.values()))


def _sum_of(path: str, terms: Sequence[Term], options: MergeOptions) -> _Sum:
    scheduled = [term for term in terms if term.is_scheduled(path)]
    factors = [term.factors(path, options) for term in terms if not term.is_scheduled(path)]
    front = None
    if factors:
        a, b = torch.cat([each[0] for each in factors]), torch.cat([each[1] for each in factors], dim=1)
        front = _Products(a, b, a.new_ones(a.shape[0]))
    if not scheduled:
        return _Sum(front)
    num_levels = {term.num_levels(path) for term in scheduled}
    are_vanilla = all(term.layer(path).spec.init == "vanilla" for term in scheduled)
    # A factor rank / active rank depends on the rank itself.
    has_gain = scheduled[0].opened.source.schedule.variant in ROUNDED
    are_aligned = len(num_levels) == 1 and not (
        has_gain and len({term.layer(path).rank for term in scheduled}) > 1
    )
    if len(scheduled) == 1:
        return _single(scheduled[0], path, front=front)
    if len(scheduled) > 2 or not (are_vanilla and are_aligned):
        names = ", ".join(printable(str(term.opened.file)) for term in scheduled)
        raise AdapterError(
            f"{path}: {names} open ranks of their own at one timestep, and a rank schedule opens one at a "
            "time. Exact are one T-LoRA with any LoRAs, and two of init vanilla with equally many scheduled "
            f"ranks. {FOLD}."
        )
    first, second = (_balanced(_of_vanilla(term, path)) for term in scheduled)
    rank = max(first.rank, second.rank)
    first, second = (each.behind(each.zeros(rank - each.rank)) for each in (first, second))
    base = replace(second, values=-second.values)
    return _Sum(front, trained=first, base=base, num_levels=num_levels.pop())


def _single(term: Term, path: str, *, front: _Products | None) -> _Sum:
    layer, num_levels = term.layer(path), term.num_levels(path)
    if layer.spec.init == "vanilla":
        return _Sum(front, trained=_of_vanilla(term, path), num_levels=num_levels)
    # The scale stays outside: rounded with it, the difference of two large products would be off.
    scale = layer.scale * abs(term.weight)
    sign = 1.0 if term.weight > 0 else -1.0
    trained, base = (
        _Products(
            layer.tensors[q].double(),
            layer.tensors[p].double().flatten(1),
            layer.tensors[values].double().flatten() * sign,
        )
        for q, p, values in (TRAINED_KEYS, BASE_KEYS)
    )
    if front is not None:
        front = replace(front, p=front.p / scale)
    return _Sum(front, trained=trained, base=base, scale=scale, num_levels=num_levels)


def _of_vanilla(term: Term, path: str) -> _Products:
    layer = term.layer(path)
    down, up = (layer.tensors[key].double() for key in VANILLA_KEYS)
    return _Products(down, up.flatten(1) * (layer.scale * term.weight), down.new_ones(layer.rank))


def _balanced(products: _Products) -> _Products:
    """The same products with factors of equal norms, so that their differences lose the fewest digits."""
    sizes = products.q.flatten(1).norm(dim=1), products.p.norm(dim=0)
    share = torch.where(sizes[0] * sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 1.0)
    column = share.view(-1, *(1,) * (products.q.ndim - 1))
    return replace(products, q=products.q * column, p=products.p / share)


def _refuse_other_gain(sums: Mapping[str, _Sum], *, always_open: int, variant: str) -> None:
    """Refuse ranks before those of a layer, which would change its factor rank / active rank."""
    for path, each in sums.items():
        if each.trained is not None and each.trained.rank != always_open + each.num_levels:
            raise AdapterError(
                f"{path}: schedule {variant} multiplies the active ranks by rank / active rank, which "
                f"further ranks would change. {FOLD}."
            )


def _parts(each: _Sum, merged: RankSchedule) -> dict[str, Tensor]:
    """The tensors of a layer in LyCORIS's layout, in float32."""
    if each.trained is None:
        assert each.front is not None, "a layer of a sum has ranks"
        return _written(VANILLA_KEYS, each.front) | {"alpha": torch.tensor(float(each.front.rank))}
    padding = merged.min_rank - each.num_always_open
    filled = each.trained.zeros(padding)
    trained = each.trained if each.front is None else each.trained.behind(each.front)
    trained = trained.behind(filled)
    rank, base = trained.rank, each.base
    if base is None and rank > min(trained.p.shape[0], trained.q[0].numel()):
        base = trained.zeros(rank)  # a layer of init vanilla is never of more ranks than its weight
    spec = TLoraSpec("vanilla" if base is None else "random", "last", merged)
    parts = {"alpha": torch.tensor(each.scale * rank), "tlora_schedule": spec.tensor(rank)}
    if base is None:
        return parts | _written(VANILLA_KEYS, trained)
    base = base.behind(base.zeros(rank - base.rank))
    return parts | _written(TRAINED_KEYS, trained) | _written(BASE_KEYS, base)


def _written(keys: Sequence[str], products: _Products) -> dict[str, Tensor]:
    ones = (1,) * (products.q.ndim - 2)
    up = products.p.reshape(*products.p.shape, *ones)
    tensors = (products.q, up, products.values[None])
    return {key: tensor.float() for key, tensor in zip(keys, tensors, strict=False)}


def _measured(path: str, layer: StoredLayer, *, live: Sequence[tuple[Tensor, Tensor]]) -> LoraLayer:
    """The written layer with all ranks active, and its error against the sum."""
    a, b = layer.factors_at(layer.rank)
    live_a, live_b = torch.cat([each[0] for each in live]), torch.cat([each[1] for each in live], dim=1)
    key = VANILLA_KEYS[0] if layer.spec.init == "vanilla" else TRAINED_KEYS[0]
    return LoraLayer(
        path=path,
        down=layer.tensors[key],
        up=b,
        alpha=layer.alpha or float(layer.rank),
        error=relative_error((live_a, live_b), (a, b.double() * layer.scale)),
        norm=float(product_norm(live_a, live_b)),
    )
