"""`simpletuner export` with models: adapter files that need their base model, and whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import Exported, ExportOptions, export_live
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.original_layout import export_model
from simpletuner.helpers.sampling.sample_command import DTYPES, SampleRequest, make_family, sections_of


def export_with_model(
    request: SampleRequest,
    output: Path,
    options: ExportOptions,
    *,
    families: Mapping[str, ModelSpec],
    overwrite: bool = True,
) -> list[Exported]:
    """Attach an adapter file of any known program to its base model, and export it.

    Args:
        request: The file, and the model.
        output: As for `export_adapter`.
        options: Layout, form, rank, dtype and schedule.
        families: Name -> spec of every model family.
        overwrite: Replace files that exist.

    Raises:
        ConfigError: The base model is unknown.
        AdapterError: The file does not fit the model, or cannot be exported.
        ModelError: The model is missing or does not load.
    """
    stored = adapter_file.read(request.adapter)
    sections = sections_of(request, header=stored.metadata, families=families)
    denoiser = make_family(sections, dtype=request.dtype).load_denoiser().eval()
    adapter = load_adapter(denoiser, request.adapter, schedule=options.schedule)
    return export_live(
        adapter,
        output,
        replace(options, schedule=None),
        family=families[sections.model.model_family],
        metadata=stored.metadata,
        overwrite=overwrite,
    )


def export_whole_model(
    folder: Path, output: Path, *, dtype: str | None, others: Mapping[str, object], overwrite: bool
) -> str:
    """Write the denoiser in a folder as one file with the original layer names.

    Args:
        folder: In diffusers' layout.
        output: The file.
        dtype: Key of DTYPES; None keeps that of the folder.
        others: Option of the command -> its value, of those that are for adapters.
        overwrite: Replace a file that exists.

    Returns:
        A sentence for people.

    Raises:
        ConfigError: An option for adapters is given.
        ModelError: It is no denoiser of a known family.
        StorageError: The file cannot be written, or exists.
    """
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        raise ConfigError(
            f"{folder} is a whole model, for which {', '.join(given)} means nothing. Remove it."
        )
    wanted = None if dtype is None else DTYPES[dtype]
    number = export_model(folder, output, dtype=wanted, overwrite=overwrite)
    return f"{output}: {number} tensors of {folder}, with the layer names of the original checkpoint"
