"""Renders and writes report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from simpletuner.helpers.io.atomic import write_text
from simpletuner.helpers.io.run_folder import PAGE_FILE, compared_page_name
from simpletuner.helpers.reporting.html_report import sections
from simpletuner.helpers.reporting.html_report.charts import Chart, Curve, draw_chart
from simpletuner.helpers.reporting.html_report.folder import RunSnapshot, display_path, read_run
from simpletuner.helpers.reporting.html_report.gallery import render_gallery, with_others
from simpletuner.helpers.reporting.html_report.markup import document, section
from simpletuner.helpers.reporting.html_report.schedule import render_schedule
from simpletuner.helpers.reporting.html_report.series import Floats, downsample, smooth
from simpletuner.helpers.reporting.html_report.usage import render_usage
from simpletuner.helpers.reporting.noise_bands import BANDS
from simpletuner.helpers.reporting.run_state import State

_SCRIPT = Path(__file__).with_name("page.js")


def write_page(
    output_dir: Path, *, state: State | None = None, step: int | None = None, others: Sequence[Path] = ()
) -> Path:
    """Render the report of an output folder and write it there; a run gives its state and step.

    With other runs it is a page of its own, which a run that goes on does not write over.

    Raises:
        NoRunError: A folder is not the output_dir of a run.
        StorageError: The report is not writable; an earlier report stays unchanged.
    """
    run = read_run(output_dir, state=state, step=step)
    if not others:
        file = output_dir / PAGE_FILE
        write_text(file, render_page(run, reloads=run.state == "running"))
        return file
    snapshots = [read_run(each) for each in others]
    compared = dict(zip(_titles(run, snapshots), (each.images for each in snapshots), strict=True))
    run = replace(run, images=with_others(run.images, compared))
    file = output_dir / compared_page_name([each.resolve().name for each in others])
    write_text(file, render_page(run, compared=[*compared]))
    return file


def render_page(run: RunSnapshot, *, reloads: bool = False, compared: Sequence[str] = ()) -> str:
    """The report as one self-contained HTML document.

    Args:
        run: What it is of.
        reloads: Whether the browser loads it again every minute.
        compared: Titles of other runs, whose images are among the run's.
    """
    blocks = [
        section("course", "Curves", _charts(run)),
        section("changes", "Changes during the run", sections.render_changes(run)),
        section("schedule", "Rank schedule", render_schedule(run)),
        section("pictures", "Images", render_gallery(run.images, compared=compared)),
        section("data", "Data", sections.render_datasets(run)),
        section("configuration", "Configuration", sections.render_configuration(run)),
        section("environment", "Environment", sections.render_environment(run)),
        section("use", "Use what was trained", render_usage(run)),
    ]
    body = "\n".join([sections.render_heading(run, reloads=reloads), *filter(None, blocks)])
    title = f"{sections.run_title(run)}: {run.state} at step {run.step}"
    return document(title, body, script=script())


def script() -> str:
    """The page's script: values under the pointer of a chart, enlarged images, buttons that copy."""
    return _SCRIPT.read_text(encoding="utf-8")


def _titles(run: RunSnapshot, others: Sequence[RunSnapshot]) -> list[str]:
    """Titles of other runs; the path of one whose title is not its own."""
    titles = [sections.run_title(each) for each in (run, *others)]
    return [
        title if titles.count(title) == 1 else display_path(other.path)
        for title, other in zip(titles[1:], others, strict=True)
    ]


def _charts(run: RunSnapshot) -> str:
    log, steps = run.log, run.log.steps
    if not log.num_rows:
        return ""
    loss, seconds = log.column("loss"), log.column("seconds")
    loss_chart = Chart(
        "Loss",
        [_curve(steps, loss, "each step", is_faint=True), _curve(steps, smooth(loss), "smoothed")],
        is_wide=True,
    )
    by_band = Chart(
        "Loss by noise level, smoothed",
        [
            _curve(steps, smooth(log.column("loss_by_band", band)), f"timesteps {band}", colour=colour)
            for colour, band in enumerate(BANDS, start=2)
        ],
        is_wide=True,
        note="Timestep 0 is the clean image, 1000 is pure noise.",
    )
    memory = [
        _curve(steps, log.column("memory_mib") / 1024, "process", colour=1),
        _curve(steps, log.column("device_memory_mib") / 1024, "GPU", colour=2),
    ]
    small = [
        Chart("Learning rate", [_curve(steps, log.column("lr"), "rate", colour=3)]),
        Chart("Mean active rank", _both(steps, log.column("mean_active_rank"), colour=4)),
        Chart(
            "Loss of regularisation images",
            [_curve(steps, smooth(log.column("prior_loss")), "smoothed", colour=3)],
            note="Part of the loss above.",
        ),
        Chart("Gradient norm", _both(steps, log.column("grad_norm"), colour=2), note="Before clipping."),
        Chart("Seconds per step", _both(steps, _without_peaks(seconds), colour=1)),
        Chart("Peak memory, GiB", memory, from_zero=True),
    ]
    scores = {"mean of the images": run.clip_scores, "mean of the EMA images": run.ema_clip_scores}
    curves = [
        _curve(np.array([*each], np.float64), np.array([*each.values()], np.float64), name, colour=colour)
        for colour, (name, each) in enumerate(scores.items(), start=3)
        if each
    ]
    if curves:
        note = "100 times the cosine of image and prompt."
        small.append(Chart("CLIP score of validation images", curves, note=note))
    marks = tuple(change["step"] for change in run.changes)
    charts = (replace(chart, marks=marks) for chart in (loss_chart, by_band, *_held_out(run), *small))
    figures = "\n".join(filter(None, map(draw_chart, charts)))
    return f'<div class="charts">\n{figures}\n</div>'


def _held_out(run: RunSnapshot) -> Sequence[Chart]:
    """The loss of held-out images, and how much larger it is than that of training images."""
    log, steps = run.evaluations, run.evaluations.steps
    held_out, trained = log.column("eval_loss"), log.column("eval_train_loss")
    gaps = [
        _curve(
            steps,
            log.column("eval_loss_by_band", band) - log.column("eval_train_loss_by_band", band),
            f"timesteps {band}",
            colour=colour,
        )
        for colour, band in enumerate(BANDS, start=2)
    ]
    return (
        Chart(
            "Loss of held-out images",
            [
                _curve(steps, trained, "training images", colour=3),
                _curve(steps, held_out, "held out", colour=2),
            ],
            is_wide=True,
            note="The same images at the same noise in every evaluation; step 0 is the base model.",
        ),
        Chart(
            "Gap: held out minus training images",
            [*gaps, _curve(steps, held_out - trained, "all", colour=1)],
            is_wide=True,
            note="At step 0 it is the difference of the images. What it grows by is overfitting.",
        ),
    )


def _without_peaks(values: Floats) -> Floats:
    """Values capped at their 99th percentile: the slow first step would flatten the others."""
    return np.minimum(values, np.nanpercentile(values, 99)) if np.isfinite(values).any() else values


def _both(steps: Floats, values: Floats, *, colour: int) -> Sequence[Curve]:
    return [
        _curve(steps, values, "each step", colour=colour, is_faint=True),
        _curve(steps, smooth(values), "smoothed", colour=colour),
    ]


def _curve(steps: Floats, values: Floats, name: str, *, colour: int = 1, is_faint: bool = False) -> Curve:
    return Curve(name, downsample(steps, values), colour=colour, is_faint=is_faint)
