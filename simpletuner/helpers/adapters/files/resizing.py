"""Lower the rank of an adapter file: the largest singular values of each layer's delta."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.helpers.adapters.files.export import with_suffix
from simpletuner.helpers.adapters.files.layouts import Layout, make_key_map, with_shared_alpha
from simpletuner.helpers.adapters.files.lora_conversion import LoraLayer
from simpletuner.helpers.adapters.files.low_rank import Keep
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions, Term
from simpletuner.helpers.adapters.files.merging import sum_of
from simpletuner.helpers.adapters.files.rewriting import (
    BaseModel,
    Opened,
    Rewritten,
    common_header,
    family_of,
    open_adapter,
    sha256_of,
    write_lora,
)
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.new_files import refuse_existing

RESIZED_KEY = "resized_from"


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """Options of a resize, one of rank and energy."""

    keep: Keep
    layout: Layout = "diffusers"
    dtype: str = "fp32"
    """Key of DTYPES."""


def resize_adapter(
    file: Path,
    output: Path,
    options: ResizeOptions,
    *,
    families: Mapping[str, ModelSpec],
    base: BaseModel | None = None,
    overwrite: bool = False,
) -> Rewritten:
    """Write the best approximation of a lower rank to each layer of an adapter file.

    The ranks of a layer are in the order of their singular values. A layer whose rank is not above the new
    one keeps its factors.

    Args:
        file: LoRA, LoHa or LoKr of any known program.
        output: The file to write, with .safetensors added where it is missing.
        options: Ranks to keep, layout and dtype.
        families: Name -> spec of every model family.
        base: The base model, for a file of another program; None without any.
        overwrite: Replace a file that exists.

    Raises:
        AdapterError: The file cannot be read or resized, or an option is invalid; nothing is written.
        StorageError: The file cannot be written, or exists and may not be replaced.
    """
    keep = options.keep
    if keep.rank is None and keep.energy is None:
        raise AdapterError("resize needs one of rank and energy. Give --rank or --energy.")
    keep.refuse_invalid()
    target = with_suffix(output)
    refuse_existing([target], overwrite=overwrite)
    opened = open_adapter(file, families=families, base=base)
    spec = family_of([opened], families=families, base=base)
    _refuse_schedule(opened)
    term, plain = Term(opened, 1.0), MergeOptions(dtype=options.dtype)
    _refuse_idle_rank(term, plain, keep)
    key_map = make_key_map(opened.paths, options.layout, spec)

    def convert(path: str, scale: float) -> LoraLayer:
        return sum_of(path, [term], plain, keep=keep, scale=scale)

    layers = with_shared_alpha(opened.paths, convert, layout=options.layout, spec=spec)
    origin = {"file": file.name, "sha256": sha256_of(file), "rank": keep.rank, "energy": keep.energy}
    origin = {key: value for key, value in origin.items() if value is not None}
    metadata = common_header([opened], spec=spec) | {RESIZED_KEY: json.dumps(origin, ensure_ascii=False)}
    write_lora(target, layers, layout=options.layout, spec=spec, key_map=key_map, metadata=metadata)
    return Rewritten(target, layers, "LoRA")


def _refuse_schedule(opened: Opened) -> None:
    if opened.scheduled:
        path = opened.scheduled[0]
        raise AdapterError(
            f"{opened.file}: {printable(path)} has a rank schedule. Each of its ranks is active at timesteps "
            "of its own, and singular values mix ranks, so no lower rank does the same at every timestep. "
            "Fold it first with `simpletuner export --timestep` or `--rank`, and resize what that writes."
        )


def _refuse_idle_rank(term: Term, options: MergeOptions, keep: Keep) -> None:
    source = term.opened.source
    if keep.rank is None or source.renamed:
        return
    largest = max(term.factors(path, options)[0].shape[0] for path in source.layers)
    if keep.rank >= largest:
        raise AdapterError(
            f"rank {keep.rank} is not below {largest}, the largest rank of {term.opened.file}: nothing would "
            "change. Give a lower rank."
        )
