"""Arguments and options that commands of `simpletuner` share. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from simpletuner.helpers.errors import ConfigError

# `--key value` is an override too, so the configuration gets every option that typer does not know; its error
# names the closest key.
TAKES_OVERRIDES = {"ignore_unknown_options": True}
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="CONFIG", help="The same. Default: config/config.json."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="The configuration: a file, its folder, or that folder's name below config. Values that "
        "override the file's.",
        show_default=False,
    ),
]

ADAPTER_ARGUMENT = typer.Argument(
    metavar="ADAPTER", help="The adapter file, or the folder or name of a run.", show_default=False
)
AdapterFile = Annotated[Path, ADAPTER_ARGUMENT]
AdapterArgument = Annotated[Path | None, ADAPTER_ARGUMENT]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="The output_dir of a run, or its name below output.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]

Layout = Literal["diffusers", "kohya", "comfyui", "lycoris"]
Form = Literal["exact", "truncated"]
Dtype = Literal["fp32", "bf16", "fp16"]
OutputFile = Annotated[Path, typer.Option("--output", metavar="FILE", help="The file to write.")]
LayoutOption = Annotated[Layout, typer.Option("--format", help="Naming of the layers.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Dtype of the tensors.")]
NamingModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Folder or repository of the base model, for a file of another program.",
    ),
]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="Print the error of each layer too.")]


def one_adapter(argument: Path | None, option: Path | None = None) -> Path:
    """The file of the adapter that an argument or --adapter names.

    Raises:
        ConfigError: None is given, or both are.
        AdapterError: There is no such file or folder, or the folder has no adapter.
    """
    from simpletuner.helpers.adapters.files.finding import find_adapter

    given = [each for each in (argument, option) if each is not None]
    if len(given) != 1:
        problem = "No adapter is" if not given else f"Two adapters are ({argument}, and --adapter {option})"
        raise ConfigError(f"{problem} given. Give one: an adapter file, or the folder or name of a run.")
    return find_adapter(given[0])
