"""Writes the tables and the plot of the finished runs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from simpletuner.demo.comparison.plan import LORA, STATIC, TLORA, VANILLA, Contender, Plan
from simpletuner.demo.comparison.plot import plot_trade_off
from simpletuner.demo.comparison.run import Benchmark
from simpletuner.demo.comparison.statistics import (
    Curves,
    Estimate,
    at_equal,
    collect,
    common_likenesses,
    difference,
    estimate,
)
from simpletuner.helpers.io.atomic import write_text

MEASURES = {
    "concept": "likeness of the concept, name alone",
    "concept_in_view": "likeness in the views asked for",
    "alignment": "prompt alignment",
    "background_back": "training background comes back",
    "pose_back": "training place comes back",
    "background_leaks": "training background against the prompt",
    "loss 0-500": "held-out loss 0-500",
    "loss 500-800": "held-out loss 500-800",
    "loss 800-1000": "held-out loss 800-1000",
    "participation": "participation ratio, every rank",
    "participation_noisiest": "participation ratio, timestep 999",
}
"""Measure -> heading."""
REFERENCES = (LORA, VANILLA, STATIC, TLORA)
"""Contenders from which the others' differences are shown."""
Group = tuple[Contender, int]


def publish(benchmark: Benchmark) -> Path | None:
    """Write report.md and trade-off.svg; returns the report's path, or None if no run is finished."""
    groups = finished(benchmark)
    if not groups:
        return None
    parts = [_heading(benchmark)]
    for rank in benchmark.plan.ranks:
        of_rank = {contender: curves for (contender, each), curves in groups.items() if each == rank}
        if of_rank:
            parts += _rank_tables(rank, of_rank, plan=benchmark.plan)
    of_every_rank = {
        group: curves for group, curves in groups.items() if group[0] in benchmark.plan.contenders
    }
    plot_trade_off(of_every_rank, benchmark.folder / "trade-off.svg")
    report = benchmark.folder / "report.md"
    write_text(report, "\n\n".join(parts) + "\n")
    return report


def finished(benchmark: Benchmark) -> dict[Group, Curves]:
    """Curves of every contender and rank with a finished run, unmasked ones as contenders of their own."""
    records: dict[Group, list[Mapping[str, Any]]] = {}
    for run in benchmark.plan.runs():
        if (record := benchmark.load(run)) is not None:
            records.setdefault((run.contender, run.rank), []).append(record)
            if record["unmasked"]:
                unmasked = record | {"points": record["unmasked"]}
                records.setdefault((run.contender.unmasked, run.rank), []).append(unmasked)
    return {group: collect(each) for group, each in records.items()}


def _heading(benchmark: Benchmark) -> str:
    plan = benchmark.plan
    are_done = [benchmark.load(run) is not None for run in plan.runs()]
    return (
        f"{sum(are_done)} of {len(are_done)} runs: concepts {', '.join(plan.concepts)}; {plan.seeds} seeds; "
        f"learning rate {plan.learning_rate:g}; batch {plan.batch}; {plan.prompts} images with a view in the "
        f"prompt and {plan.neutral} without per measurement. Means over concepts and seeds, "
        f"95 % bootstrap intervals over runs. "
        f"torch {torch.__version__}, {platform.machine()}."
    )


def _rank_tables(rank: int, curves: Mapping[Contender, Curves], *, plan: Plan) -> list[str]:
    parts = [f"## Rank {rank}"]
    for step in plan.unequal:
        rows = {each.name: _row(each_curves, step) for each, each_curves in curves.items()}
        parts.append(f"### After {step} steps, all alike\n\n{_table(rows)}")
        for reference in REFERENCES:
            parts += _differences(curves, reference=reference, step=step, reference_step=step)
        parts += _unmasked_differences(curves, step=step)
    few, many = plan.unequal
    parts += _differences(curves, reference=LORA, step=many, reference_step=few)
    parts += _equal(curves, plan=plan)
    return parts


def _row(curves: Curves, step: int) -> dict[str, Estimate | None]:
    return {heading: estimate(curves.at(measure, step)) for measure, heading in MEASURES.items()}


def _differences(
    curves: Mapping[Contender, Curves], *, reference: Contender, step: int, reference_step: int
) -> list[str]:
    """Difference of each contender to a reference, on the same concepts and seeds."""
    other = curves.get(reference)
    rows = {
        contender.name: {
            heading: difference(each.at(measure, step), other.at(measure, reference_step))
            for measure, heading in MEASURES.items()
        }
        for contender, each in curves.items()
        if other is not None and contender is not reference and each.keys == other.keys
    }
    if not rows:
        return []
    return [f"#### After {step} steps, less {reference.name} after {reference_step}\n\n{_table(rows)}"]


def _unmasked_differences(curves: Mapping[Contender, Curves], *, step: int) -> list[str]:
    """Difference of sampling with every rank active to sampling with the mask, of the same files."""
    rows = {
        contender.name: {
            heading: difference(curves[contender.unmasked].at(measure, step), each.at(measure, step))
            for measure, heading in MEASURES.items()
        }
        for contender, each in curves.items()
        if contender.unmasked in curves
    }
    return [f"#### After {step} steps, unmasked less masked\n\n{_table(rows)}"] if rows else []


def _equal(curves: Mapping[Contender, Curves], *, plan: Plan) -> list[str]:
    """Prompt alignment at equal likeness, within the range that the plan's contenders of every rank share."""
    likenesses = common_likenesses(
        [each for contender, each in curves.items() if contender in plan.contenders]
    )
    rows = {
        contender.name: {
            f"at likeness {likeness:.2f}": at_equal(each, "alignment", likeness=likeness)
            for likeness in likenesses
        }
        for contender, each in curves.items()
    }
    return [f"### Prompt alignment at equal likeness of the concept\n\n{_table(rows)}"]


def _table(rows: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    headings = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    for name, row in rows.items():
        cells = ("-" if each is None else str(each) for each in row.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
