"""The commands of `simpletuner` that make an adapter file of other files. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli_options import (
    AdapterFile,
    DtypeOption,
    Layout,
    LayoutOption,
    NamingModel,
    OutputFile,
    Overwrite,
    PerLayer,
    one_adapter,
)
from simpletuner.helpers.io.logs import configure_logging


def merge(
    *,
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Adapter files, or folders or names of runs."),
    ],
    output: OutputFile,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="Factor of each adapter. Default: 1 for all."),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            "--format", help="Naming of the layers. Default: diffusers, lycoris for a rank schedule."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Keep this rank of each layer's sum. Default: the sum of the ranks."),
    ] = None,
    active_rank: Annotated[
        int | None, typer.Option("--active-rank", help="Fold T-LoRA files at this active rank.")
    ] = None,
    timestep: Annotated[
        int | None,
        typer.Option("--timestep", help="Instead of --active-rank: the active rank at this timestep."),
    ] = None,
    dtype: DtypeOption = "fp32",
    model: NamingModel = None,
    per_layer: PerLayer = False,
    overwrite: Overwrite = False,
) -> None:
    """Add adapter files with weights to one file; exact for LoRAs, and for one T-LoRA among them."""
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.merge_terms import MergeOptions
    from simpletuner.helpers.adapters.files.merging import merge_adapters, parsed_weights
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.sampling.merge_command import base_model

    options = MergeOptions(
        weights=() if weights is None else parsed_weights(weights),
        layout=layout,
        rank=rank,
        active_rank=active_rank,
        timestep=timestep,
        dtype=dtype,
    )
    files = [one_adapter(adapter) for adapter in adapters]
    base = base_model(model)
    written = merge_adapters(
        files, output, options, families=registry.specs(), base=base, overwrite=overwrite
    )
    print(written.text(per_layer=per_layer))


def resize(
    *,
    adapter: AdapterFile,
    output: OutputFile,
    rank: Annotated[int | None, typer.Option("--rank", help="The largest rank of a layer.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            help="Instead of --rank: each layer's smallest rank with this share of its squared singular "
            "values.",
        ),
    ] = None,
    layout: LayoutOption = "diffusers",
    dtype: DtypeOption = "fp32",
    model: NamingModel = None,
    per_layer: PerLayer = False,
    overwrite: Overwrite = False,
) -> None:
    """Lower the rank of an adapter file by singular values, and report the error."""
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.low_rank import Keep
    from simpletuner.helpers.adapters.files.resizing import ResizeOptions, resize_adapter
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.sampling.merge_command import base_model

    options = ResizeOptions(keep=Keep(rank=rank, energy=energy), layout=layout, dtype=dtype)
    file, base = one_adapter(adapter), base_model(model)
    written = resize_adapter(file, output, options, families=registry.specs(), base=base, overwrite=overwrite)
    print(written.text(per_layer=per_layer))


def extract(
    *,
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="Folder, .safetensors file or repository.")
    ],
    tuned: Annotated[
        str, typer.Option("--tuned", metavar="MODEL", help="The model that the LoRA should make of it.")
    ],
    output: OutputFile,
    rank: Annotated[int, typer.Option("--rank", help="Rank of each layer.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="CLASS",
            help="Class of modules whose layers are extracted; may be repeated. Default: Attention and "
            "FeedForward, which mean this family's.",
        ),
    ] = None,
    layout: LayoutOption = "diffusers",
    dtype: DtypeOption = "fp32",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Folder or repository with the configuration of the denoiser, for two .safetensors files.",
        ),
    ] = None,
    per_layer: PerLayer = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the difference of two models as a LoRA, and report the error."""
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.extraction import ExtractOptions
    from simpletuner.helpers.sampling import extract_command

    options = ExtractOptions(rank=rank, targets=target, layout=layout, dtype=dtype)
    written = extract_command.extract(base, tuned, output, options=options, model=model, overwrite=overwrite)
    print(written.text(per_layer=per_layer))


COMMANDS: dict[str, Callable[..., None]] = {"merge": merge, "resize": resize, "extract": extract}
