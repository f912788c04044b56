"""Merge adapter files: the sum of their deltas, each with a weight, as one file.

Shapes: R rank of a layer, n ranks of a sum, I in (times the kernel of a convolution), O out features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from simpletuner.helpers.adapters.files import merged_schedules
from simpletuner.helpers.adapters.files.export import DTYPES, with_suffix
from simpletuner.helpers.adapters.files.layouts import make_key_map, with_shared_alpha
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer, lora_layer, truncated_product
from simpletuner.helpers.adapters.files.low_rank import Keep, low_rank_layer
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions, Term
from simpletuner.helpers.adapters.files.rewriting import (
    BaseModel,
    Rewritten,
    common_header,
    family_of,
    open_adapter,
    refuse_other_shapes,
    sha256_of,
    warn_about_other_bases,
    write_lora,
)
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.new_files import refuse_existing

MERGED_KEY = "merged_from"


def merge_adapters(
    files: Sequence[Path],
    output: Path,
    options: MergeOptions,
    *,
    families: Mapping[str, ModelSpec],
    base: BaseModel | None = None,
    overwrite: bool = False,
) -> Rewritten:
    """Write the weighted sum of adapter files.

    A sum of LoRAs has the ranks of all of them, so that rounding is its only error. One T-LoRA among LoRAs,
    and files whose ranks can be opened together, keep the rank schedule.

    Args:
        files: At least two.
        output: The file to write, with .safetensors added where it is missing.
        options: Weights, layout, ranks and dtype.
        families: Name -> spec of every model family.
        base: The base model, for files of other programs; None without any.
        overwrite: Replace a file that exists.

    Raises:
        AdapterError: A file cannot be read or merged, or an option is invalid; nothing is written.
        StorageError: The file cannot be written, or exists and may not be replaced.
    """
    weights = checked_weights(options.weights, num_files=len(files))
    Keep(rank=options.rank).refuse_invalid()
    target = with_suffix(output)
    refuse_existing([target], overwrite=overwrite)
    opened = [open_adapter(file, families=families, base=base) for file in files]
    spec = family_of(opened, families=families, base=base)
    terms = [Term(each, weight) for each, weight in zip(opened, weights, strict=True)]
    _check_options(terms, options)
    refuse_other_shapes(opened)
    warn_about_other_bases(opened)
    metadata = common_header(opened, spec=spec) | {MERGED_KEY: _made_of(terms)}
    if not options.folds and any(each.scheduled for each in opened):
        return merged_schedules.write(target, terms, options, metadata=metadata)
    layout = options.layout or "diffusers"
    paths = list(dict.fromkeys(path for each in opened for path in each.paths))
    key_map = make_key_map(paths, layout, spec)

    def convert(path: str, scale: float) -> LoraLayer:
        own = [term for term in terms if term.has(path)]
        return sum_of(path, own, options, keep=Keep(rank=options.rank), scale=scale)

    layers = with_shared_alpha(paths, convert, layout=layout, spec=spec)
    write_lora(target, layers, layout=layout, spec=spec, key_map=key_map, metadata=metadata)
    what = "LoRA" if not options.folds else "LoRA without a rank schedule"
    return Rewritten(target, layers, what)


def sum_of(path: str, terms: Sequence[Term], options: MergeOptions, *, keep: Keep, scale: float) -> LoraLayer:
    """The sum of one layer's deltas: all their ranks, or the singular values that are kept."""
    dtype = DTYPES[options.dtype]
    if any(path in term.opened.source.renamed for term in terms):
        deltas = [term.dense(path, options) for term in terms]
        return low_rank_layer(path, torch.stack(deltas).sum(0), keep=keep, dtype=dtype, scale=scale)
    factors = [term.factors(path, options) for term in terms]
    a, b = torch.cat([each[0] for each in factors]), torch.cat([each[1] for each in factors], dim=1)
    written = (a, b) if keep.all_of(a.shape[0]) else truncated_product(a, b, keep.choose)
    return lora_layer(path, written, live=(a, b), dtype=dtype, scales=(1.0, scale))


def parsed_weights(text: str) -> list[float]:
    """Read weights that are separated by commas.

    Raises:
        AdapterError: One is no number.
    """
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise AdapterError(
            f"weights {text!r} are no numbers separated by commas. Write them as in 0.7,0.3."
        ) from error


def checked_weights(weights: Sequence[float], *, num_files: int) -> Sequence[float]:
    """The weight of each file.

    Raises:
        AdapterError: There are fewer than two files, another number of weights, or one is 0 or not finite.
    """
    if num_files < 2:
        raise AdapterError(
            f"merge got {num_files} file and needs at least 2. `simpletuner export` converts one file, "
            "`simpletuner resize` lowers its rank."
        )
    weights = weights or [1.0] * num_files
    if len(weights) != num_files:
        raise AdapterError(
            f"weights has {counted(len(weights), 'value')} for {num_files} files. "
            "Give one for each file, in order."
        )
    for weight in weights:
        if weight == 0 or not math.isfinite(weight):
            raise AdapterError(f"weights: {weight:g} is no weight. Give finite numbers other than 0.")
    return weights


def _check_options(terms: Sequence[Term], options: MergeOptions) -> None:
    opened = [term.opened for term in terms]
    if options.active_rank is not None and options.timestep is not None:
        raise AdapterError("active rank and timestep exclude each other. Use one of them.")
    scheduled = [each for each in opened if each.scheduled]
    if options.folds and not scheduled:
        raise AdapterError("active rank, timestep: no file has a rank schedule. Omit them.")
    largest = max((each.source.schedule.max_rank for each in scheduled), default=0)
    if options.active_rank is not None and not 1 <= options.active_rank <= largest:
        raise AdapterError(
            f"active rank {options.active_rank} must be in 1..{largest}, the rank of the files."
        )
    end = min((each.source.schedule.num_timesteps for each in scheduled), default=0)
    if options.timestep is not None and not 0 <= options.timestep <= end:
        raise AdapterError(f"timestep {options.timestep} is outside 0..{end} of the files' schedules.")
    for each in opened:
        if each.source.renamed and options.rank is None:
            path = next(iter(each.source.renamed))
            raise AdapterError(
                f"{each.file}: {printable(path)} is a LoHa or LoKr, whose sum with others is no LoRA of few "
                "ranks. Give --rank for the best approximation; its error is reported for each layer."
            )


def _made_of(terms: Sequence[Term]) -> str:
    return json.dumps(
        [
            {
                "file": term.opened.file.name,
                "weight": term.weight,
                "sha256": sha256_of(term.opened.file),
            }
            for term in terms
        ],
        ensure_ascii=False,
    )
