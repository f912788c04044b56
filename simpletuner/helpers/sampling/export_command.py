"""`simpletuner export --model`: files that can only be exported with their base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import Exported, ExportOptions, export_live
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.sampling.sample_command import SampleRequest, make_family, sections_of


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
