"""The `simpletuner` command: parses and dispatches, decides nothing, imports no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from simpletuner import __version__, train
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

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune diffusion models with timestep-dependent LoRA (T-LoRA).",
)


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
    run = load_config(config, overrides=tuple(overrides or ()), families=registry.facts())
    if resolved:
        print(json.dumps(run.resolved(), indent=2, ensure_ascii=False))
        return
    print(f"{config}: valid. {len(run.datasets)} dataset(s), output in {run.checkpoint.output_dir}.")


@app.command("config-reference")
def config_reference(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help=f"Write here instead, for instance {REFERENCE}."),
    ] = None,
) -> None:
    """Print the page that describes every configuration key."""
    from simpletuner.helpers.configuration.reference import reference

    page = reference(registry.facts())
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
