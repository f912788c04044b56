"""The `simpletuner` command: parses arguments and dispatches, without importing torch.

A command imports what it calls: --help shows all commands and needs none of that.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from simpletuner import (
    __version__,
    cli_cache,
    cli_compare,
    cli_data,
    cli_estimate,
    cli_files,
    cli_init,
    cli_runs,
    cli_sample,
)
from simpletuner.cli_options import (
    SAMPLE_OPTIONS,
    TAKES_OVERRIDES,
    AdapterFile,
    ConfigOption,
    Dtype,
    Form,
    LayoutOption,
    NamingModel,
    OutputFile,
    Overrides,
    Overwrite,
    PerLayer,
    RunFolder,
    ScheduleOption,
    given_values,
    one_adapter,
)
from simpletuner.helpers.errors import SimpleTunerError
from simpletuner.helpers.io.logs import configure_logging
from simpletuner.helpers.io.redaction import redact_terminal

REFERENCE = Path("documentation/config-reference.md")

COMPARISON = Path("output/benchmark-tlora")
PlanName = Literal["quick", "standard", "full"]
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
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def simpletuner(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Fine-tune diffusion models with timestep-dependent LoRA (T-LoRA)."""
    del version


@app.command("train", context_settings=TAKES_OVERRIDES)
def train_command(config: ConfigOption = None, arguments: Overrides = None) -> None:
    """Train in this process; resumes an interrupted run from its last checkpoint."""
    from simpletuner import train

    option = [] if config is None else ["--config", str(config)]
    raise typer.Exit(train.main([*option, *(arguments or ())]))


@app.command(context_settings=TAKES_OVERRIDES)
def validate(
    *,
    config: ConfigOption = None,
    arguments: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the value of every key.")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Read the headers of all images, not of the first 2,000.")
    ] = False,
) -> None:
    """Check config.json, the lycoris json and the dataset json: every mistake, or what the run will do."""
    from simpletuner.helpers.configuration.finding import choose_config
    from simpletuner.helpers.configuration.load import load_config
    from simpletuner.helpers.models import registry

    file, overrides = choose_config(config, arguments or ())
    run = load_config(file, overrides=overrides, families=registry.specs())
    if resolved:
        print(json.dumps(run.resolved(), indent=2, ensure_ascii=False))
        return
    # Its image library is not needed above.
    from simpletuner.helpers.training.plan import plan_lines

    # All of it first: what the data makes impossible is an error, and nothing is valid then.
    lines = list(plan_lines(run, registry.specs()[run.model.model_family], reads_all=data))
    print(f"{file}: valid.")
    for line in lines:
        print(line)


@app.command("inspect")
def inspect_command(
    adapter: AdapterFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe an adapter file: algorithm, ranks, rank schedule, base model, training.

    The file of a new token has its word and its embeddings instead.
    """
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.inspection import inspect_any

    found = inspect_any(one_adapter(adapter))
    print(found.as_json() if as_json else found.text())


@app.command("export")
def export_command(
    *,
    adapter: AdapterFile,
    output: OutputFile,
    layout: LayoutOption = "diffusers",
    form: Annotated[
        Form, typer.Option("--form", help="exact has rank 2R; truncated has rank R and an error.")
    ] = "exact",
    rank: Annotated[int | None, typer.Option("--rank", help="Active rank. Default: the full rank.")] = None,
    timestep: Annotated[
        int | None, typer.Option("--timestep", help="Instead of --rank: the active rank at this timestep.")
    ] = None,
    bands: Annotated[
        int | None,
        typer.Option("--bands", help="Instead of --rank: the number of files, one per range of timesteps."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", help="Dtype of the tensors. Default: fp32; of a whole model, as it is."),
    ] = None,
    schedule: ScheduleOption = None,
    model: NamingModel = None,
    family: Annotated[
        str | None, typer.Option("--family", help="With --model. Default: from the file.")
    ] = None,
    per_layer: PerLayer = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a T-LoRA file to LoRA for tools without a rank schedule, or a whole model to one file."""
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
    from simpletuner.helpers.adapters.files.finding import find_model
    from simpletuner.helpers.configuration.schema.schedule_options import schedule_options
    from simpletuner.helpers.models import registry

    if (folder := find_model(adapter)) is not None:
        from simpletuner.helpers.sampling.export_command import export_whole_model

        given = {"rank": rank, "timestep": timestep, "bands": bands, "model": model, "schedule": schedule}
        print(export_whole_model(folder, output, dtype=dtype, others=given, overwrite=overwrite))
        return
    adapter = one_adapter(adapter)
    options = ExportOptions(
        layout=layout,
        form=form,
        rank=rank,
        timestep=timestep,
        bands=bands,
        dtype=dtype or "fp32",
        schedule=schedule_options(schedule) if schedule is not None else None,
    )
    if model is None:
        exported = export_adapter(adapter, output, options, families=registry.specs(), overwrite=overwrite)
    else:
        from simpletuner.helpers.sampling.export_command import export_with_model
        from simpletuner.helpers.sampling.sample_command import SampleRequest

        request = SampleRequest(
            adapter=adapter,
            prompts=(),
            model=given_values(model_family=family, pretrained_model_name_or_path=model),
            validation={},
            dtype=None,
            options=SAMPLE_OPTIONS,
        )
        exported = export_with_model(request, output, options, families=registry.specs(), overwrite=overwrite)
    for each in exported:
        print(each.summary())
        for path, error in each.errors.items() if per_layer else ():
            print(f"{error:.1e} {path}")


app.command("init")(cli_init.init)
app.command("estimate", context_settings=TAKES_OVERRIDES)(cli_estimate.estimate_command)
for name, command in {
    **cli_sample.COMMANDS,
    **cli_compare.COMMANDS,
    **cli_files.COMMANDS,
    **cli_runs.COMMANDS,
}.items():
    app.command(name)(command)


@app.command("publish")
def publish_command(
    *,
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="The output_dir of a run.")],
    repo: Annotated[
        str | None,
        typer.Option("--repo", metavar="OWNER/NAME", help="Default: hub_model_id of the run."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Create a public repository, or upload to one.")
    ] = False,
) -> None:
    """Upload a run's adapter and model card to the Hugging Face hub, or what is missing there."""
    configure_logging(main_process=True)
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.publishing.hub import bound_waits
    from simpletuner.helpers.publishing.publish import publish

    bound_waits()
    print(publish(output_dir, families=registry.specs(), repository=repo, public=public).summary())


@app.command("report")
def report_command(
    output_dir: RunFolder,
    others: Annotated[
        list[Path] | None,
        typer.Option(
            "--with",
            metavar="RUN",
            help="Write a page of its own with the images of another run beside. May be repeated.",
        ),
    ] = None,
) -> None:
    """Write report.html from the files of a run, finished or not."""
    from simpletuner.helpers.reporting.html_report.page import write_page
    from simpletuner.helpers.reporting.run_list import find_run

    print(write_page(find_run(output_dir), others=[find_run(each) for each in others or ()]))


@benchmark_app.command("tlora")
def benchmark_tlora(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="DIR", help="Folder of the results; an interrupted benchmark resumes there."
        ),
    ] = COMPARISON,
    size: Annotated[
        PlanName,
        typer.Option("--size", help="quick takes three minutes; full adds initialisations and rank 64."),
    ] = "standard",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Parallel runs, one thread each.")] = 1,
) -> None:
    """Compare LoRA, T-LoRA and variants on the embedded model by closed-form measures."""
    from simpletuner.demo.comparison.publish import publish
    from simpletuner.demo.comparison.run import benchmark_for, compare

    configure_logging(main_process=True)
    benchmark = benchmark_for(output, size=size)
    compare(benchmark, workers=workers)
    print(publish(benchmark))


@examples_app.command("list")
def examples_list() -> None:
    """List every example with a description."""
    from simpletuner.helpers.configuration.examples import examples

    for name, description in examples().items():
        print(f"{name:24}{description}")


@examples_app.command("copy")
def examples_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The example's name.")],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Default: config/NAME.", show_default=False),
    ] = None,
) -> None:
    """Copy an example to your own folder, without overwriting files."""
    from simpletuner.helpers.configuration.examples import copy_example

    config = copy_example(name, folder)
    print(f"{config}: set output_dir there, and instance_data_dir in the dataset json beside it.")
    print(f"Then check it: simpletuner validate --config {config}")


@app.command("migrate")
def migrate_command(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_COMMAND",
            help="A toml, yaml or json of another program, a script, a command line in quotes, or a "
            "folder of SimpleTuner's.",
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder of the written files.")],
    overwrite: Overwrite = False,
) -> None:
    """Translate files of kohya's scripts, ai-toolkit, OneTrainer, diffusers' examples or SimpleTuner."""
    from simpletuner.helpers.configuration.migration.detection import is_command, translate
    from simpletuner.helpers.configuration.migration.report import summary
    from simpletuner.helpers.configuration.migration.writing import write_migration
    from simpletuner.helpers.data.preview import header_size
    from simpletuner.helpers.models import registry

    specs = registry.specs()
    draft = translate(source, specs=specs, header_size=header_size)
    name = "a command line" if is_command(source) else source
    written = write_migration(draft, to, source=name, specs=specs, overwrite=overwrite)
    print(f"{draft.program}, {summary(draft)}.")
    for file in written.files:
        print(f"  {file}")
    state = "valid" if written.is_valid else "written, but not valid yet"
    print(f"{written.config}: {state}.")
    for line in written.to_do:
        print(f"  to do       {line}")


@app.command("config-reference")
def config_reference(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help=f"Write to a file, for instance {REFERENCE}."),
    ] = None,
    overwrite: Overwrite = False,
    simpletuner: Annotated[
        bool, typer.Option("--simpletuner", help="The page for people who come from SimpleTuner.")
    ] = False,
) -> None:
    """Print the reference page of the configuration keys."""
    from simpletuner.helpers.configuration.reference import reference
    from simpletuner.helpers.configuration.simpletuner_page import simpletuner_page
    from simpletuner.helpers.io.atomic import write_text
    from simpletuner.helpers.io.new_files import refuse_existing
    from simpletuner.helpers.models import registry

    page = simpletuner_page() if simpletuner else reference(registry.specs())
    if output is None:
        print(page, end="")
    else:
        refuse_existing([output], overwrite=overwrite)
        write_text(output, page)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line; a SimpleTunerError ends it with its message and exit code."""
    redact_terminal()
    try:
        app(prog_name="simpletuner")
    except SimpleTunerError as error:
        print(f"simpletuner: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
