"""A LoRA of the difference of two denoisers, read and approximated layer by layer.

Shapes: I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from simpletuner.helpers.adapters import targets
from simpletuner.helpers.adapters.files import adapter_file, labels
from simpletuner.helpers.adapters.files.export import DTYPES
from simpletuner.helpers.adapters.files.layouts import Layout, make_key_map, with_shared_alpha
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.adapters.files.low_rank import Keep, low_rank_layer
from simpletuner.helpers.adapters.files.rewriting import Rewritten, write_lora
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import counted, printable

ReadWeight = Callable[[str], Tensor | None]
"""Name of a weight in diffusers' layout -> the weight; None if the model's files have no such name."""
MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Options of an extraction."""

    rank: int
    """Of each layer; of a smaller layer its smaller side."""
    targets: Sequence[str] | None = None
    """Classes of modules whose linear layers and convolutions are extracted; by default the generic ones."""
    layout: Layout = "diffusers"
    dtype: str = "fp32"
    """Key of DTYPES."""


@dataclass(frozen=True, kw_only=True)
class TwoModels:
    """The weights of two denoisers of one architecture."""

    denoiser: nn.Module
    """On meta: only its layers' names and shapes are used."""
    base: ReadWeight
    tuned: ReadWeight
    base_name: str
    """Folder, file or repository."""
    tuned_name: str
    """Name without its folder."""

    def weights(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A weight of both; None if the files of one have no such name.

        Raises:
            AdapterError: A shape differs.
        """
        shape = self.denoiser.get_parameter(name).shape
        found = self.base(name), self.tuned(name)
        for weight, model in zip(found, (self.base_name, self.tuned_name), strict=True):
            if weight is not None and weight.shape != shape:
                raise AdapterError(
                    f"{model}: {name} has shape {tuple(weight.shape)} instead of {tuple(shape)}. Give two "
                    "models of one architecture."
                )
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    def layer(self, path: str) -> tuple[Tensor, Tensor]:
        """The weight of a layer in both models.

        Raises:
            AdapterError: One has no such layer, or a shape differs.
        """
        found = self.weights(f"{path}.weight")
        if found is None:
            raise AdapterError(
                f"{self.base_name} or {self.tuned_name} has no layer {path}. Give two models of one "
                "architecture."
            )
        return found


def extract_lora(
    models: TwoModels, target: Path, options: ExtractOptions, *, spec: ModelSpec, notes: Sequence[str] = ()
) -> Rewritten:
    """Write the best LoRA of a rank for the difference of two denoisers.

    Only one layer of both is in memory at a time. A layer that does not differ is not in the file.

    Args:
        models: The base, and the one that the LoRA should make of it.
        target: The file to write.
        options: Rank, targets, layout and dtype.
        spec: The family.
        notes: Further lines for the report.

    Raises:
        AdapterError: The models are of different architectures or equal, or an option is invalid.
        StorageError: The file cannot be written.
    """
    keep = Keep(rank=options.rank)
    keep.refuse_invalid()
    paths = _targeted(models.denoiser, options, spec=spec)
    hashes: dict[str, str] = {}

    def convert(path: str, scale: float) -> LoraLayer:
        base, tuned = models.layer(path)
        hashes[adapter_file.layer_name(path)] = adapter_file.weight_hash(base)
        delta = tuned.double() - base.double()
        return low_rank_layer(path, delta, keep=keep, dtype=DTYPES[options.dtype], scale=scale)

    differing = [path for path in paths if _difference(*models.layer(path))[0] > 0]
    if not differing:
        raise AdapterError(
            f"{models.tuned_name}: none of its {len(paths)} target layers differs from {models.base_name}. "
            "Give two models that differ, or other layers with --target."
        )
    key_map = make_key_map(differing, options.layout, spec)
    layers = with_shared_alpha(differing, convert, layout=options.layout, spec=spec)
    metadata = {
        "model_family": spec.name,
        "base_model": models.base_name,
        "extracted_from": json.dumps({"base": Path(models.base_name).name, "tuned": models.tuned_name}),
        adapter_file.VERSION_KEY: adapter_file.VERSION,
        adapter_file.HASH_KEY: json.dumps(hashes),
        **labels.labels_of_extract(spec, models.base_name),
    }
    write_lora(target, layers, layout=options.layout, spec=spec, key_map=key_map, metadata=metadata)
    left_out, unread = _left_out(models, extracted=differing)
    equal = len(paths) - len(differing)
    lines = [f"{counted(equal, 'target layer')} without a difference."] if equal else []
    dtypes = [str(weight.dtype).removeprefix("torch.") for weight in models.layer(differing[0])]
    if dtypes[0] != dtypes[1]:
        lines.append(f"The models are stored in {' and '.join(dtypes)}: rounding is part of the difference.")
    lines += _summary(left_out, unread, extracted=layers)
    shown = [f"{difference:.1e}  left out  {printable(name)}" for name, difference, _ in left_out]
    return Rewritten(target, layers, "LoRA of the difference", notes=[*lines, *notes], left_out=shown)


def _targeted(denoiser: nn.Module, options: ExtractOptions, *, spec: ModelSpec) -> list[str]:
    """Paths of the linear layers and convolutions in the targets."""
    given = list(options.targets or targets.GENERIC_TARGETS)
    chosen = targets.translate({"target_module": given}, aliases=spec.target_aliases)
    classes = {type(module).__name__ for module in denoiser.modules()}
    idle = [name for name in chosen.modules if name not in classes]
    paths = [
        path
        for path in targets.resolve(chosen, denoiser)
        if isinstance(layer := denoiser.get_submodule(path), nn.Linear | nn.Conv2d)
        and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
    ]
    # A family's generic names cover several models, so one of their classes may be absent.
    unknown = [name for name in idle if name in given]
    if unknown or not paths:
        raise AdapterError(targets.no_match_message(unknown or given, denoiser, key="--target"))
    sides = [_smaller_side(denoiser, path) for path in paths]
    if options.rank > max(sides):
        raise AdapterError(
            f"rank {options.rank} is above {max(sides)}, the smaller side of the largest layer. Lower it."
        )
    return paths


def _smaller_side(denoiser: nn.Module, path: str) -> int:
    shape = cast(Tensor, denoiser.get_submodule(path).weight).shape
    return min(shape[0], math.prod(shape[1:]))


def _difference(base: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Frobenius norm of the difference of two weights, and of the base."""
    return float((tuned.double() - base.double()).norm()), float(base.double().norm())


def _left_out(
    models: TwoModels, *, extracted: Sequence[str]
) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Weights outside the file that differ, as (name, relative difference, difference); and unread names."""
    done = {f"{path}.weight" for path in extracted}
    found, unread = [], []
    for name, _ in models.denoiser.named_parameters():
        if name in done:
            continue
        weights = models.weights(name)
        if weights is None:
            unread.append(name)
            continue
        difference, size = _difference(*weights)
        if difference > 0:
            found.append((name, difference / size if size else math.inf, difference))
    return sorted(found, key=lambda each: -each[1]), unread


def _summary(
    left_out: Sequence[tuple[str, float, float]], unread: Sequence[str], *, extracted: Sequence[LoraLayer]
) -> list[str]:
    lines = []
    if left_out:
        outside = math.hypot(*(difference for _, _, difference in left_out))
        whole = math.hypot(outside, *(layer.norm for layer in extracted))
        lines += [
            f"Left out, though different: {counted(len(left_out), 'weight')}, "
            f"{(outside / whole) ** 2:.1%} of the squared difference; by their relative difference:",
            *(f"  {relative:.1e}  {printable(name)}" for name, relative, _ in left_out[:MOST_SHOWN]),
        ]
        if len(left_out) > MOST_SHOWN:
            lines.append(f"  and {len(left_out) - MOST_SHOWN} more; --per-layer lists them.")
    if unread:
        lines.append(
            f"Not compared: {counted(len(unread), 'weight')} whose name in the file is not known, for "
            f"instance {printable(unread[0])}."
        )
    return lines
