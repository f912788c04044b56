"""The commands `simpletuner ask` and `simpletuner runs`: runs that are going on, and all others."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from simpletuner.cli_options import RunFolder
from simpletuner.helpers.io.names import printable

Request = Literal["sample", "save", "stop"]


def ask(
    output_dir: RunFolder,
    request: Annotated[
        Request,
        typer.Argument(
            metavar="sample|save|stop",
            help="sample: generate the validation images now; save: save a checkpoint; stop: save a "
            "checkpoint and end, as a signal does.",
        ),
    ],
    *,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the run's answer.")] = False,
) -> None:
    """Ask a run that is going on for validation images, a checkpoint, or its end, at its next step."""
    from simpletuner.helpers.checkpointing.requests import RequestError, ask
    from simpletuner.helpers.reporting.run_list import find_run
    from simpletuner.helpers.reporting.run_state import read_status

    folder = find_run(output_dir)
    status = read_status(folder)
    if status.state != "running":
        raise RequestError(
            f"{printable(str(folder))}: no run is going on there; {status.state} at step {status.step:,}. "
            "`simpletuner runs` lists those that are."
        )
    print(ask(folder, request, is_waiting=not no_wait, say=_say))


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Runs in it and two levels of folders below are listed.")
    ] = Path("output"),
) -> None:
    """List runs with their state, step, time left and newest validation grid."""
    from simpletuner.helpers.reporting.run_list import list_runs, table

    found = list_runs(folder)
    for line in table(found, below=folder) if found else [f"{printable(str(folder))}: no runs there."]:
        print(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Callable[..., None]] = {"ask": ask, "runs": runs}
