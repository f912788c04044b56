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


ScheduleOption = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="KEY=VALUE,...",
        help="Rank schedule in place of the file's, of min_rank, alpha, kind, scale: min_rank=8,alpha=1.0.",
    ),
]
SAMPLE_OPTIONS = {
    "model_family": "--family",
    "pretrained_model_name_or_path": "--model",
    "validation_resolution": "--size",
    "validation_num_inference_steps": "--steps",
    "validation_lycoris_strength": "--strength",
    "validation_guidance": "--guidance",
    "validation_guidance_real": "--guidance-real",
    "validation_seed": "--seed",
    "num_validation_images": "--count",
    "validation_noise_scheduler": "--scheduler",
    "validation_reference_images": "--reference",
    "base_model_precision": "--precision",
    "user_prompt_library": "--prompts-file",
}
"""Configuration key -> option of `sample` and `compare`, for messages."""


Prompts = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="May be repeated.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts-file",
        metavar="FILE",
        help="Further prompts: a text with one on each line, or a json as of user_prompt_library.",
    ),
]
References = Annotated[
    list[Path] | None,
    typer.Option(
        "--reference",
        metavar="FILE",
        help="Reference image of every prompt, for models that edit. May be repeated.",
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", metavar="N", help="Seed of each prompt. May be repeated.", show_default=False),
]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale; 1 or below disables it.")]
GuidanceReal = Annotated[
    float | None,
    typer.Option(
        "--guidance-real",
        help="Classifier-free guidance by a second pass, for families with a guidance embedding.",
    ),
]
Negative = Annotated[str | None, typer.Option("--negative", metavar="TEXT", help="Negative prompt.")]
SamplerName = Annotated[
    str | None, typer.Option("--scheduler", help="Sampler, as validation_noise_scheduler.")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Folder or repository. Default: from the file."),
]
FamilyName = Annotated[str | None, typer.Option("--family", help="Default: from the file.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="As base_model_precision. Default: from the file.")
]
ModelDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="Dtype of the model. Default: bf16 on a GPU, else fp32.")
]
EmbeddingFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding",
        metavar="FILE[=TOKEN]",
        help="Embeddings of a new token (textual inversion), beside those of the adapter's run. May be "
        "repeated.",
    ),
]


def given_values(**values: object) -> dict[str, object]:
    """The values that are given, by their keys."""
    return {key: value for key, value in values.items() if value is not None}


def listed(text: str) -> list[str]:
    """The parts of a comma-separated text."""
    return [part.strip() for part in text.split(",")]


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
