"""Renders and writes the page of `simpletuner compare`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from simpletuner.helpers.contracts import ComparedColumn, ComparedGroup, ComparedRow
from simpletuner.helpers.io.atomic import write_text
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.reporting.compare_page.held_out import (
    MEASURE,
    HeldOut,
    losses_of,
    lower_elsewhere,
    lowest_of,
)
from simpletuner.helpers.reporting.html_report import page as report
from simpletuner.helpers.reporting.html_report.folder import display_path, read_run
from simpletuner.helpers.reporting.html_report.gallery import (
    PIXEL_ART_EDGE_PX,
    image_table,
    thumbnail_or_none,
)
from simpletuner.helpers.reporting.html_report.markup import document, escape, note, section
from simpletuner.helpers.reporting.run_state import NoRunError

NOT_COMPARED = (
    "These have held-out losses of other images, or by another loss, and are not compared with each other:"
)
_STYLE = Path(__file__).with_name("compare.css")


def write_page(file: Path, groups: Sequence[ComparedGroup]) -> list[str]:
    """Render the page and write it.

    Returns:
        Lines for the terminal: the page, the best checkpoints, what is missing.

    Raises:
        StorageError: The file is not writable.
    """
    write_text(file, render_page(groups))
    lines = [str(file)]
    for group in groups:
        lines += [f"  {sentence}" for sentence in _best(group)]
        failed = dict.fromkeys((each.title, each.problem) for each in group.columns if each.problem)
        lines += [f"  {title} has no images: {problem}" for title, problem in failed]
    return lines


def render_page(groups: Sequence[ComparedGroup]) -> str:
    """The page as one self-contained HTML document."""
    runs = {each.run: None for group in groups for each in group.columns if each.run is not None}
    names = [display_path(run) for run in runs]
    title = f"Comparison of {counted(len(runs), 'run')}" if runs else "Comparison of adapters"
    columns = sum(len(group.columns) for group in groups)
    header = (
        f"<header>\n<h1>{escape(title)}</h1>\n<p>{counted(columns, 'column')} of the same prompts and seeds, "
        f"<small>as of {time.strftime('%Y-%m-%d %H:%M')}</small></p>\n"
        f"<ul>{''.join(f'<li>{escape(_state(run))}</li>' for run in runs)}</ul>\n</header>"
    )
    warning = (
        note("Runs of different base models stand in tables of their own; their scores are not compared.")
        if len(groups) > 1
        else ""
    )
    blocks = [
        section(f"group-{index}", _heading(group, index, len(groups)), *_group(group))
        for index, group in enumerate(groups, start=1)
    ]
    return document(
        f"{title}: {', '.join(names)}" if names else title,
        "\n".join([header, warning, *blocks]),
        script=report.script(),
        style=_STYLE.read_text(encoding="utf-8"),
    )


def _state(run: Path) -> str:
    """A run and how far it is."""
    name = display_path(run)
    try:
        found = read_run(run)
    except NoRunError:
        return f"{name}: its log and its configuration are gone."
    of = f" of {found.max_steps:,}" if found.max_steps and found.state != "finished" else ""
    return f"{name}: {found.state} at step {found.step:,}{of}"


def _heading(group: ComparedGroup, index: int, number: int) -> str:
    count = f"{index} of {number}: " if number > 1 else ""
    return f"{count}{display_path(group.model)}"


def _group(group: ComparedGroup) -> list[str]:
    return [
        f"<p>{escape(group.settings)}</p>",
        "".join(f'<p class="best">{escape(sentence)}</p>' for sentence in _best(group)),
        _scores(group),
        "".join(
            f'<p class="problem">{escape(title)}: {escape(problem)}</p>'
            for title, problem in dict.fromkeys(
                (each.title, each.problem) for each in group.columns if each.problem
            )
        ),
        _images(group),
    ]


def _best(group: ComparedGroup) -> list[str]:
    """Which checkpoint is best by each measure, in sentences."""
    losses = losses_of(group.columns)
    lowest = lowest_of(group.columns, losses)
    sentences = [
        f"Lowest held-out loss: {each.column.title} ({each.loss:.5f}, of {each.num_compared} checkpoints)."
        for each in lowest
        if each.num_compared > 1
    ]
    if len(lowest) > 1:
        names = "; ".join(each.column.title for each in lowest)
        sentences.append(f"{NOT_COMPARED} {names}.")
    for measure in _measures(group):
        scores = _scores_of(group, measure)
        best = [group.columns[index] for index in _highest(scores)]
        names = "; ".join(map(_full_title, best)) or f"all {len(scores)} alike"
        if scores:
            sentences.append(f"Highest {measure}: {names} ({max(scores.values()):.4g}).")
    return [*sentences, *lower_elsewhere(group.columns, losses)]


def _measures(group: ComparedGroup) -> list[str]:
    return [*dict.fromkeys(name for column in group.columns for name in column.scores)]


def _scores_of(group: ComparedGroup, measure: str) -> dict[int, float]:
    """Index of a column -> its score, without base models."""
    return {
        index: column.scores[measure]
        for index, column in enumerate(group.columns)
        if measure in column.scores and not column.is_base
    }


def _highest(scores: Mapping[int, float]) -> list[int]:
    """Indices of the highest scores; none where several are all alike."""
    best = [index for index, score in scores.items() if score == max(scores.values())]
    return best if len(best) < len(scores) or len(best) == 1 else []


def _full_title(column: ComparedColumn) -> str:
    return ", ".join(filter(None, (column.title, column.details)))


def _scores(group: ComparedGroup) -> str:
    """A table with a row for each column; "" without a score."""
    losses, measures = losses_of(group.columns), _measures(group)
    best = {measure: _highest(_scores_of(group, measure)) for measure in measures}
    lowest = {id(each.column) for each in lowest_of(group.columns, losses) if each.num_compared > 1}
    names = [*([MEASURE] if losses else []), *measures]
    if not names:
        return ""
    rows = []
    for index, column in enumerate(group.columns):
        cells = []
        if losses:
            cells.append(_number(losses.get(index), is_best=id(column) in lowest))
        cells += [_score(column.scores, name, is_best=index in best[name]) for name in measures]
        title = escape(_full_title(column))
        rows.append(f'<tr><th scope="row">{title}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(found: HeldOut | None, *, is_best: bool) -> str:
    return _cell("" if found is None else f"{found.loss:.5f}", is_best=is_best)


def _score(scores: Mapping[str, float], name: str, *, is_best: bool) -> str:
    return _cell(f"{scores[name]:.4g}" if name in scores else "", is_best=is_best)


def _cell(text: str, *, is_best: bool) -> str:
    return f'<td class="best">{text} best</td>' if is_best else f"<td>{text}</td>"


def _images(group: ComparedGroup) -> str:
    heads = "".join(
        f'<th scope="col">{escape(column.title)}<br><small>{escape(column.details)}</small></th>'
        for column in group.columns
    )
    bodies = "\n".join(_row(row, group.columns) for row in group.rows)
    return image_table(heads, bodies)


def _row(row: ComparedRow, columns: Sequence[ComparedColumn]) -> str:
    head = f"<span>{escape(row.prompt) or '<em>no prompt</em>'} <small>{escape(row.details)}</small></span>"
    cells = "".join(_image(row, column) for column in columns)
    return (
        f'<tbody><tr><th scope="rowgroup" colspan="{len(columns)}">{head}</th></tr><tr>{cells}</tr></tbody>'
    )


def _image(row: ComparedRow, column: ComparedColumn) -> str:
    file = column.images.get(row.name)
    image = None if file is None else thumbnail_or_none(file)
    if image is None:
        return '<td><span class="missing">none</span></td>'
    alt = escape(", ".join(filter(None, (row.prompt, column.title, column.details, row.details))))
    small = ' class="pixels"' if max(image.width, image.height) <= PIXEL_ART_EDGE_PX else ""
    return (
        f'<td><img{small} alt="{alt}" width="{image.width}" height="{image.height}" decoding="async" '
        f'src="{image.uri}"></td>'
    )
