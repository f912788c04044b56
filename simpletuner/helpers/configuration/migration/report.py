"""MIGRATION.md: what became of each key, and why; and the tables of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.helpers.configuration.migration.draft import HIDDEN, SECRET, Draft
from simpletuner.helpers.configuration.migration.table import PROGRAMS, Row, load_table
from simpletuner.helpers.configuration.text.decisions import Decision, Outcome
from simpletuner.helpers.configuration.text.problems import shown
from simpletuner.helpers.io.names import counted, printable

TITLES: dict[Outcome, str] = {
    "not translated": "Not translated",
    "approximate": "Approximately the same",
    "translated": "Translated exactly",
    "same": "The same key and value",
    "no effect": "Without effect",
}
"""Outcome -> heading, in the order of the page."""
PLACES = {
    "command": "command line, toml",
    "graphical": "the graphical program's own",
    "dataset": "datasets",
    "process": "process",
    "run": "run",
    "concept": "concepts",
}


def counts(decisions: Sequence[Decision]) -> dict[Outcome, int]:
    """Outcome -> number of decisions, in the order of the page."""
    found = Counter(decision.outcome for decision in decisions)
    return {outcome: found[outcome] for outcome in TITLES}


def report(draft: Draft, *, source: str, files: Sequence[Path], to_do: Sequence[str]) -> str:
    """The page about one migration.

    Args:
        draft: What was written.
        source: The file, or "a command line".
        files: The files beside the page.
        to_do: What the user must still supply, a sentence each.
    """
    lines = [
        "# Migration",
        "",
        f"From {printable(source)}, a configuration of {draft.program}, to "
        f"{', '.join(f'`{file.name}`' for file in files)}.",
        "",
        "## Before the run",
        "",
    ]
    lines += [f"- {printable(each)}" for each in to_do] or ["Nothing: the configuration is valid."]
    lines += ["", "## Length of the run", "", *_length(draft), ""]
    for outcome, title in TITLES.items():
        found = [each for each in draft.decisions if each.outcome == outcome]
        if found:
            lines += [f"## {title} ({len(found)})", "", *_table(found), ""]
    return "\n".join(lines)


def _length(draft: Draft) -> Iterator[str]:
    length, steps = draft.length, draft.config.get("max_train_steps")
    if length is None and steps:
        yield f"{steps} optimiser steps, as the file says."
        return
    if length is None:
        yield (
            f"{draft.program} counts epochs, and the images are not here: the run has the same epochs, and "
            "as many steps as its own buckets give."
        )
        return
    accumulation = int(str(draft.config.get("gradient_accumulation_steps", 1)))
    ours = length.steps * int(str(draft.config.get("train_batch_size", 1))) * accumulation
    yield f"| | {draft.program} | here |"
    yield "|---|---|---|"
    yield f"| optimiser steps | {length.steps:,} | {length.steps:,} |"
    yield f"| images in all | {length.samples:,} | {ours:,} |"
    if length.formula:
        yield from ("", f"{draft.program}: {length.formula}.")
    if ours != length.samples:
        yield from (
            "",
            "Here every batch is full: the last one of a bucket begins the next pass over its images.",
        )


def _table(decisions: Sequence[Decision]) -> Iterator[str]:
    yield "| key | value | here | why |"
    yield "|---|---|---|---|"
    for each in decisions:
        is_secret = SECRET.search(each.key) is not None
        ours = f"`{_cell(each.ours)}`" if each.ours and not is_secret else ""
        value = HIDDEN if is_secret and each.value else shown(each.value)
        yield f"| `{_cell(each.key)}` | `{_cell(value)}` | {ours} | {_cell(each.text)} |"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("`", "'")


def summary(draft: Draft) -> str:
    """The numbers of decisions in one line."""
    number = counts(draft.decisions)
    parts = (
        (number["same"] + number["translated"], "exact"),
        (number["approximate"], "approximate"),
        (number["not translated"], "not translated"),
        (number["no effect"], "without effect"),
    )
    return f"{counted(sum(each for each, _ in parts), 'key')}: " + ", ".join(
        f"{each} {name}" for each, name in parts
    )


def documentation_tables() -> str:
    """The tables of the page on migration: every key of every program, and what becomes of it."""
    lines: list[str] = []
    for program in PROGRAMS:
        table = load_table(program)
        for place, rows in table.groups.items():
            lines += [
                f"### {table.program}: {PLACES[place]}",
                "",
                "| keys | here | outcome | note |",
                "|---|---|---|---|",
            ]
            lines += [_documented(row) for row in rows]
            lines.append("")
    return "\n".join(lines).rstrip()


def _documented(row: Row) -> str:
    keys = ", ".join(f"`{key}`" for key in row.keys)
    worse = [f"`{name}`" for name, value in row.values.items() if value.outcome == "not translated"]
    others = f" Not translated: {', '.join(worse)}." if worse else ""
    return f"| {keys} | {_cell(row.ours)} | {row.outcome} | {_cell(row.text)}{others} |"
