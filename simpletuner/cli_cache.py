"""The commands `simpletuner cache`: what a cache holds, whether it is whole, what can go."""

from pathlib import Path
from typing import Annotated

import typer

from simpletuner.helpers.io.logs import configure_logging
from simpletuner.helpers.io.names import counted

MIB = 1 << 20

app = typer.Typer(no_args_is_help=True, help="Look after cached latents and prompt embeds.")
Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="The folder of cache_dir_vae or cache_dir_text, or one above it."),
]


@app.command("stats")
def stats_command(folder: Folder) -> None:
    """Count the entries of a cache, by the headers of its files."""
    from simpletuner.helpers.caching.maintenance import stats, stores_under

    for store in stores_under(folder):
        found = stats(store)
        print(
            f"{store}: {counted(found.entries, 'entry', 'entries')} in {counted(found.shards, 'shard')} and "
            f"{counted(found.single_files, 'single file')}, {found.num_bytes / MIB:.1f} MiB; "
            f"{found.repeated} repeated, {found.damaged} damaged{_unreadable(found.unreadable_shards)}."
        )


@app.command("verify")
def verify_command(folder: Folder) -> None:
    """Read every entry of a cache; the next run makes damaged ones anew. Exit code 1 if there are any."""
    from simpletuner.helpers.caching.maintenance import stores_under, unreadable_shards, verify

    configure_logging(main_process=True)
    num_damaged = 0
    for store in stores_under(folder):
        damaged, unreadable = verify(store), unreadable_shards(store)
        num_damaged += len(damaged) + len(unreadable)
        entries = counted(len(damaged), "damaged entry", "damaged entries")
        print(f"{store}: {entries}{_unreadable(len(unreadable))}.")
    if num_damaged:
        raise typer.Exit(1)


@app.command("prune")
def prune_command(
    folder: Folder,
    *,
    used_by: Annotated[
        list[str] | None,
        typer.Option(
            "--used-by",
            metavar="CONFIG",
            help="Remove entries that none of these configurations uses; one option for each.",
        ),
    ] = None,
) -> None:
    """Remove damaged and repeated entries of a cache, and pack small shards and single files."""
    from simpletuner.helpers.caching.maintenance import prune, stores_under

    configure_logging(main_process=True)
    stores = stores_under(folder)
    used: dict[Path, set[str]] | None = None
    if used_by:
        from simpletuner.helpers.configuration.finding import find_config
        from simpletuner.helpers.configuration.load import load_config
        from simpletuner.helpers.models import registry
        from simpletuner.helpers.training.used_entries import used_entries

        used = {}
        for name in used_by:
            config = load_config(find_config(Path(name)), families=registry.facts())
            for place, keys in used_entries(config).items():
                used.setdefault(place, set()).update(keys)
    for store in stores:
        done = prune(store, used=None if used is None else used.get(store.resolve(), set()))
        print(
            f"{store}: removed {counted(done.removed, 'entry', 'entries')}, packed {done.packed} anew, "
            f"{done.freed_bytes / MIB:.1f} MiB freed."
        )


def _unreadable(number: int) -> str:
    return f", {counted(number, 'unreadable shard')}" if number else ""
