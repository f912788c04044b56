"""The `simpletuner` command: parses and dispatches, decides nothing, imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from simpletuner import __version__, train
from simpletuner.helpers.configuration.examples import copy_example, examples
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.models import registry

REFERENCE = Path("documentation/config-reference.md")

# `--key value` is an override too, so an option that typer does not know is handed to the configuration,
# whose error names the nearest key.
TAKES_OVERRIDES = {"ignore_unknown_options": True}
ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="The configuration file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that win over the file's.", show_default=False),
]

SAMPLES = Path("output/samples")
COMPARISON = Path("output/benchmark-tlora")
PlanName = Literal["quick", "standard", "full"]
Layout = Literal["diffusers", "kohya", "comfyui", "lycoris"]
Form = Literal["exact", "truncated"]
Dtype = Literal["fp32", "bf16", "fp16"]
SAMPLE_OPTIONS = {
    "model_family": "--family",
    "pretrained_model_name_or_path": "--model",
    "validation_resolution": "--size",
    "validation_num_inference_steps": "--steps",
    "validation_guidance": "--guidance",
    "validation_guidance_real": "--guidance-real",
    "validation_seed": "--seed",
    "num_validation_images": "--count",
    "validation_noise_scheduler": "--scheduler",
    "base_model_precision": "--precision",
}
"""Key of the configuration -> option of `sample` that sets it, for messages."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune diffusion models with timestep-dependent LoRA (T-LoRA).",
)

benchmark_app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(benchmark_app, name="benchmark")

examples_app = typer.Typer(no_args_is_help=True, help="Configurations to start from.")
app.add_typer(examples_app, name="examples")


@app.command("train", context_settings=TAKES_OVERRIDES)
def train_command(config: ConfigOption = train.DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Train in this process; a run that was interrupted goes on from its last checkpoint."""
    raise typer.Exit(train.main(["--config", str(config), *(overrides or ())]))


@app.command(context_settings=TAKES_OVERRIDES)
def validate(
    config: ConfigOption = train.DEFAULT_CONFIG,
    overrides: Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every value the run would use.")
    ] = False,
) -> None:
    """Check the configuration, the adapter's json and the dataset json, and list every mistake."""
    run = load_config(config, overrides=tuple(overrides or ()), families=registry.specs())
    if resolved:
        print(json.dumps(run.resolved(), indent=2, ensure_ascii=False))
        return
    print(f"{config}: valid. {len(run.datasets)} dataset(s), output in {run.checkpoint.output_dir}.")


@app.command("sample")
def sample_command(
    *,
    adapter: Annotated[Path, typer.Option("--adapter", metavar="FILE", help="The adapter's file.")],
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="May be repeated.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Their folder.")] = SAMPLES,
    negative: Annotated[str, typer.Option("--negative", metavar="TEXT", help="What to lead away from.")] = "",
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Default: the family's.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 30,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="1 or below is no guidance; default: the family's.")
    ] = None,
    guidance_real: Annotated[
        float, typer.Option("--guidance-real", help="By a second pass, where the family has one.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the first picture; the others count up.")] = 0,
    count: Annotated[int, typer.Option("--count", help="Pictures per prompt and size.")] = 1,
    strength: Annotated[float, typer.Option("--strength", help="0 is the base model.")] = 1.0,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="As validation_noise_scheduler; default: the model's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Folder or repository; default: what the file says."),
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="Default: what the file says.")] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="As base_model_precision; default: what the file says."),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the model; default: bf16 on a GPU, else fp32.")
    ] = None,
) -> None:
    """Make pictures with an adapter; the base model and the rank schedule are read from its file."""
    from simpletuner.helpers.io.logs import configure_logging
    from simpletuner.helpers.sampling.sample_command import SampleRequest, sample

    configure_logging(main_process=True)
    request = SampleRequest(
        adapter=adapter,
        prompts=prompt,
        model=_given(model_family=family, pretrained_model_name_or_path=model),
        validation=_given(
            validation_negative_prompt=negative,
            validation_resolution=size,
            validation_num_inference_steps=steps,
            validation_guidance=guidance,
            validation_guidance_real=guidance_real,
            validation_seed=seed,
            num_validation_images=count,
            validation_lycoris_strength=strength,
            validation_noise_scheduler=scheduler,
        ),
        dtype=dtype,
        precision=_given(base_model_precision=precision),
        options=SAMPLE_OPTIONS,
    )
    for file in sample(request, output=output, families=registry.specs()):
        print(file)


def _given(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


@app.command("inspect")
def inspect_command(
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="The adapter's file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as json.")] = False,
) -> None:
    """Say what an adapter file is: algorithm, ranks, rank schedule, base model, training."""
    from simpletuner.helpers.adapters.files.inspection import inspect

    found = inspect(adapter)
    print(found.as_json() if as_json else found.text())


@app.command("export")
def export_command(
    *,
    adapter: Annotated[Path, typer.Argument(metavar="FILE", help="The adapter's file.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The file to write.")],
    layout: Annotated[Layout, typer.Option("--format", help="Whose names the layers get.")] = "diffusers",
    form: Annotated[
        Form, typer.Option("--form", help="exact has rank 2R; truncated has rank R and an error.")
    ] = "exact",
    rank: Annotated[int | None, typer.Option("--rank", help="Open rank; default: all.")] = None,
    timestep: Annotated[
        int | None, typer.Option("--timestep", help="Instead: the rank that the schedule opens there.")
    ] = None,
    bands: Annotated[
        int | None, typer.Option("--bands", help="Instead: so many files, one for each range of timesteps.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the tensors written.")] = "fp32",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Print the error of each layer too.")
    ] = False,
) -> None:
    """Write a T-LoRA file as a plain LoRA for tools that know no rank schedule."""
    from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter

    options = ExportOptions(layout=layout, form=form, rank=rank, timestep=timestep, bands=bands, dtype=dtype)
    for each in export_adapter(adapter, output, options, families=registry.specs()):
        print(each.summary())
        for path, error in each.errors.items() if per_layer else ():
            print(f"{error:.1e} {path}")


@app.command("report")
def report_command(
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="The output_dir of a run.")],
) -> None:
    """Make the page that shows a run, finished or not, from what lies in its folder: report.html."""
    from simpletuner.helpers.reporting.html_report.page import write_page

    print(write_page(output_dir))


@benchmark_app.command("tlora")
def benchmark_tlora(
    *,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", help="Folder of the results; a later start goes on there."),
    ] = COMPARISON,
    size: Annotated[
        PlanName,
        typer.Option("--size", help="quick takes three minutes; full adds initialisations and rank 64."),
    ] = "standard",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs side by side, one thread each.")] = 1,
) -> None:
    """Compare LoRA, T-LoRA and what lies between on the embedded model, measured in closed form."""
    from simpletuner.demo.comparison.publish import publish
    from simpletuner.demo.comparison.run import benchmark_for, compare
    from simpletuner.helpers.io.logs import configure_logging

    configure_logging(main_process=True)
    benchmark = benchmark_for(output, size=size)
    compare(benchmark, workers=workers)
    print(publish(benchmark))


@examples_app.command("list")
def examples_list() -> None:
    """Print the name of every example and what it is."""
    for name, what in examples().items():
        print(f"{name:24}{what}")


@examples_app.command("copy")
def examples_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The example's name.")],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where to; default: config/NAME.", show_default=False),
    ] = None,
) -> None:
    """Copy an example to a folder of your own; nothing that is there is overwritten."""
    config = copy_example(name, folder)
    print(f"{config}: set output_dir there, and instance_data_dir in the dataset json beside it.")
    print(f"Then check it: simpletuner validate --config {config}")


@app.command("config-reference")
def config_reference(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help=f"Write here instead, for instance {REFERENCE}."),
    ] = None,
) -> None:
    """Print the page that describes every configuration key."""
    from simpletuner.helpers.configuration.reference import reference

    page = reference(registry.specs())
    if output is None:
        print(page, end="")
    else:
        output.write_text(page, encoding="utf-8")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line; an error that a user can act on ends as one message and its exit code."""
    try:
        app(prog_name="simpletuner")
    except SimpleTunerError as error:
        print(f"simpletuner: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
