"""The HTML report of synthetic output folders, and its behaviour in a browser where Chromium is installed."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from simpletuner.helpers.configuration.text.secrets import HIDDEN, without_secrets
from simpletuner.helpers.io.run_folder import CONFIG_FILE
from simpletuner.helpers.reporting.html_report import gallery, writer
from simpletuner.helpers.reporting.html_report.charts import Chart, Curve, draw_chart, nice_ticks
from simpletuner.helpers.reporting.html_report.folder import NoRunError, display_path, read_run, relative_path
from simpletuner.helpers.reporting.html_report.markup import (
    data_block,
    format_duration,
    format_number,
)
from simpletuner.helpers.reporting.html_report.page import write_page
from simpletuner.helpers.reporting.html_report.series import Points, downsample, read_log, smooth
from simpletuner.helpers.reporting.html_report.writer import RunPage
from tests.integration.synthetic_run import BANDS, NASTY, SECRET, Page, SyntheticRun, code_of, record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def html_of(run: SyntheticRun) -> str:
    return write_page(run.write()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of one run, read by several tests."""
    return html_of(SyntheticRun(tmp_path_factory.mktemp("run")))


# Curves.


def test_downsampled_curve_holds_mean_and_range_of_consecutive_steps() -> None:
    steps, values = np.arange(1.0, 6.0), np.array([1.0, 3.0, np.nan, 8.0, np.nan])
    points = downsample(steps, values, max_points=3)
    assert points.steps.tolist() == [2, 4, 5]
    assert points.means[:2].tolist() == [2.0, 8.0]
    assert [points.lows[:2].tolist(), points.highs[:2].tolist()] == [[1.0, 8.0], [3.0, 8.0]]
    assert math.isnan(points.means[2])


def test_short_curve_is_not_downsampled() -> None:
    steps = np.arange(1.0, 301.0)
    assert downsample(steps, steps).means.tolist() == steps.tolist()


def test_smoothing_ignores_steps_without_a_value() -> None:
    values = smooth(np.array([4.0, np.nan, 1.0]))
    assert math.isnan(values[1])
    assert values[2] == pytest.approx((0.8 * 4 + 1) / 1.8)  # keep is 1 - 1/5 for a short run


def test_log_is_read_past_an_incomplete_line_and_without_newer_fields(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 0.5}\n[]\n{"step": 2, "loss": 0.25, "loss_by_band": {"0-500": 0.25}}\n{"st'
    )
    log = read_log(file)
    assert log.steps.tolist() == [1, 2]
    assert log.column("loss").tolist() == [0.5, 0.25]
    assert np.isnan(log.column("memory_mib")).all()
    assert log.column("loss_by_band", "0-500")[1] == 0.25


def test_log_field_that_begins_and_ends_in_the_middle_has_no_value_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "loss": 0.5}\n{"step": 3, "loss": null}\n{"step": 4}\n')
    assert np.isfinite(read_log(file).column("loss")).tolist() == [False, True, False, False]


def test_page_of_a_longer_run_takes_hardly_more_memory(tmp_path: Path) -> None:
    def peak_bytes(steps: int) -> int:
        folder = SyntheticRun(tmp_path / str(steps), steps=steps, validations=0).write()
        tracemalloc.start()
        try:
            write_page(folder)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = 1000, 4000
    peak_bytes(few)  # imports, and what is read once
    assert (peak_bytes(many) - peak_bytes(few)) / (many - few) < 300, "bytes per step"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (3.0, 97.0, [0, 25, 50, 75, 100]),
        (0.0, 1e-4, [0, 2.5e-5, 5e-5, 7.5e-5, 1e-4]),
        (5.0, 5.0, [2, 4, 6, 8]),
        (0.0, 0.0, [-0.5, -0.25, 0, 0.25, 0.5]),
        (5.0, math.nextafter(5.0, 6.0), [2, 4, 6, 8]),
        (-5.0, math.nextafter(-5.0, 0.0), [-8, -6, -4, -2]),
        (100_000.0, 100_004.0, [100_000, 100_001, 100_002, 100_003, 100_004]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_one_spike_does_not_flatten_the_loss() -> None:
    steps = np.arange(1.0, 1001.0)
    values = np.where(steps == 500, 1e6, 1 + np.sin(steps))
    figure = draw_chart(Chart("Loss", [Curve("each step", downsample(steps, values), is_faint=True)]))
    side = figure.partition('class="side"')[2].partition("</div>")[0]
    assert float(re.findall(r">([\d.k]+)</span>", side)[-1]) < 10


def test_rare_value_of_a_firm_curve_is_shown() -> None:
    timesteps = np.arange(1001.0)
    ranks = np.where(timesteps == 0, 16.0, 15.0)
    figure = draw_chart(Chart("Active rank", [Curve("active rank", Points(timesteps, ranks, ranks, ranks))]))
    assert re.search(r'class="line c1" d="M0.0 0.0L', figure), "at the top, at the label 16"
    assert ">16</span>" in figure


def test_chart_of_one_step_shows_a_line() -> None:
    one = np.array([1.0])
    assert re.search(
        r'class="line c1" d="M0.0 [\d.]+h1000"', draw_chart(Chart("Loss", [Curve("x", downsample(one, one))]))
    )


def test_chart_of_equal_values_is_drawn_although_their_running_mean_is_off_in_the_last_bit() -> None:
    values = np.full(3, 0.9351295249095365)
    steps, means = np.arange(1.0, 4.0), smooth(values)
    assert 0 < np.abs(means - values).max() < 1e-15
    each = Curve("each step", downsample(steps, values), is_faint=True)
    figure = draw_chart(Chart("Loss", [each, Curve("smoothed", downsample(steps, means))]))
    assert re.search(r'class="line c1" d="M0.0 (\d+\.\d)L500.0 \1L1000.0 \1"', figure)


def test_chart_without_a_value_is_left_out() -> None:
    assert draw_chart(Chart("GPU", [Curve("GPU", downsample(np.array([1.0]), np.array([np.nan])))])) == ""


# The page.


def test_sections_have_their_order(html: str) -> None:
    anchors = [each["id"] for each in Page(html).all("section")]
    assert anchors == ["course", "schedule", "pictures", "data", "configuration", "environment", "use"]


def test_page_loads_nothing(html: str) -> None:
    page = Page(html)
    targets = [
        each[name]
        for _, each in page.elements
        for name in ("src", "href", "srcset", "action")
        if name in each
    ]
    assert targets
    assert all(str(target).startswith("data:image/") for target in targets)
    assert "url(" not in html
    assert "@import" not in html
    assert not page.all("link")
    assert "http-equiv" in page.all("meta")[1]


def test_policy_allows_only_the_pages_own_script(html: str) -> None:
    page = Page(html)
    policy = next(each["content"] for each in page.all("meta") if each.get("http-equiv")) or ""
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    running = [each for each in page.all("script") if each.get("type") != "application/json"]
    assert len(running) == 1


def test_user_text_is_escaped(html: str) -> None:
    page = Page(html)
    assert page.text.count(NASTY) == 5, "prompt, caption, name of a file, setting, instance prompt"
    assert not page.all("b") or NASTY not in html
    assert "<b>cat</b>" not in html
    assert "alert('x')</script>" not in html
    assert any(NASTY in str(each["alt"]) for each in page.all("img"))


def test_secrets_are_hidden_everywhere(html: str) -> None:
    assert SECRET not in html
    assert "not-to-be-seen" not in html
    assert "user:password" not in html
    assert HIDDEN in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"wandb_api_key": "x", "tokens": ["y"]}, {"wandb_api_key": HIDDEN, "tokens": HIDDEN}),
        ({"tokenizer": "x", "key": 1, "hub_token": None}, {"tokenizer": "x", "key": 1, "hub_token": None}),
        (["a ghp_0123456789abcdef b"], [f"a {HIDDEN} b"]),
    ],
)
def test_secret_is_recognised_by_its_key_or_its_form(value: object, shown: object) -> None:
    assert without_secrets(value) == shown


def test_text_in_chart_data_cannot_close_the_script_element() -> None:
    block = data_block({"name": NASTY})
    assert block.count("</script>") == 1
    assert json.loads(Page(block).scripts[0]) == {"name": NASTY}


def test_home_folder_is_shortened(html: str) -> None:
    assert f"~{Path('/pictures/cats')}" in Page(html).text
    assert str(Path.home() / "pictures") not in html


def test_charts_are_well_formed_and_have_titles(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    titles = [str(ElementTree.fromstring(each).findtext("title")) for each in drawings]
    starts = ["Loss over", "Loss by noise level", "Learning rate", "Mean active rank", "Gradient norm"]
    starts += ["Seconds per step", "Peak memory", "Active rank over timestep 0 to 1,000"]
    assert all(title.startswith(start) for title, start in zip(titles, starts, strict=True)), titles
    assert all(f"timesteps {band}" in titles[1] for band in BANDS)


def test_charts_hold_the_numbers_of_the_log(html: str) -> None:
    readings = [json.loads(each) for each in Page(html).scripts[:-1]]
    assert readings[0]["x"] == list(range(1, 51))
    assert readings[0]["y"][0] == pytest.approx([record(step)["loss"] for step in range(1, 51)], rel=1e-4)
    ranks = readings[-1]
    assert [ranks["y"][0][timestep] for timestep in (0, 1, 499, 500, 999, 1000)] == [64, 40, 40, 20, 20, 4]


def test_data_section_counts_images_captions_and_skipped_files(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for words in (
        "6 of 7 images, 5 distinct texts",
        "64x64 to 640x480",
        "3 x each image",
        "and 1 more",
    ):
        assert words in text


def test_changed_settings_precede_those_at_their_default(html: str) -> None:
    text = Page(html).text
    assert text.index("learning_rate") < text.index("settings at their default") < text.index("hub_token")


def test_numbers_are_short() -> None:
    assert [format_number(each) for each in (0.123456, 1e-7, 12345.6, 4800.0, math.nan)] == [
        "0.1235", "1e-07", "12,346", "4,800", "-",
    ]  # fmt: skip
    assert [format_duration(each) for each in (1.25, 75, 7325)] == ["1.2 s", "1 min 15 s", "2 h 2 min"]


# States and versions.


def test_changes_of_a_later_start_are_listed_and_marked_in_every_chart_over_steps(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.write()
    assert 'class="mark"' not in write_page(tmp_path).read_text()
    lines = [f"seed: 1 before, {NASTY} now", f"key: {SECRET}"]
    run.json("changes.json", [{"step": 20, "changes": lines}, {"step": 900, "changes": ["later"]}])
    html = write_page(tmp_path).read_text()
    assert "After step 20" in html
    assert NASTY not in html
    assert SECRET not in html
    figures = [
        figure for figure in html.split("<figure")[1:] if 'class="line' in figure and "at step" in figure
    ]
    assert len(figures) >= 5
    assert all(figure.count('class="mark"') == 1 for figure in figures), "step 900 is beyond the curves"


def test_state_follows_from_the_files_of_the_folder(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.write()
    assert read_run(tmp_path).state == "died"
    run.json("exit.json", {"outcome": "stopped, the same command goes on"})
    assert read_run(tmp_path).state == "stopped"
    run.json("exit.json", {"outcome": "failed"})
    assert read_run(tmp_path).state == "failed"
    run.json(".run.holder.json", {"pid": 1, "host": "another"})
    assert read_run(tmp_path).state == "running"
    run.json("finished.json", {"step": 49})
    assert read_run(tmp_path).state == "running", "an earlier start finished at step 49; this one continues"
    run.json("finished.json", {"step": 50})
    assert read_run(tmp_path).state == "finished"
    (tmp_path / ".run.holder.json").unlink()
    assert "finished, 50 steps" in write_page(tmp_path).read_text()
    assert "running at step 50 of 100" in write_page(tmp_path, state="running").read_text()


@pytest.mark.reliability_row(5)
def test_steps_are_those_of_the_state_where_a_full_disk_cut_the_log(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=12)
    run.write()
    (tmp_path / "checkpoint-20").mkdir()
    assert "died at step 20 of 24" in write_page(tmp_path).read_text()
    run.json("finished.json", {"step": 24})
    assert "finished, 24 steps" in write_page(tmp_path).read_text()
    assert "running at step 15 of 24" in write_page(tmp_path, state="running", step=15).read_text()


def test_folder_of_an_earlier_version_still_has_a_page(tmp_path: Path) -> None:
    SyntheticRun(tmp_path, steps=3, validations=1).write()
    new = {"loss_by_band", "memory_mib", "device_memory_mib"}
    lines = [{key: value for key, value in record(step).items() if key not in new} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "run.json").unlink()
    html = write_page(tmp_path).read_text()
    page = Page(html)
    anchors = [each["id"] for each in page.all("section")]
    assert anchors == ["course", "schedule", "pictures", "data", "configuration", "use"]
    assert "From 64 ranks at the clean image to 4 at pure noise" in page.text
    assert [each["alt"] for each in page.all("img")][:2] == [
        "prompt, base model, 32x32, seed 1",
        "prompt, step 3, 32x32, seed 1",
    ]
    assert "Loss by noise level" not in html


def test_page_of_steps_of_zero_seconds_shows_no_speed(tmp_path: Path) -> None:
    SyntheticRun(tmp_path).write()
    lines = [record(step) | {"seconds": 0.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with np.errstate(all="raise"):
        text = " ".join(Page(write_page(tmp_path).read_text()).text.split())
    assert "time in steps0.0 s" in text
    assert "samples/s" not in text


def test_log_with_steps_alone_has_a_page(tmp_path: Path) -> None:
    SyntheticRun(tmp_path).write()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "running at step 1 of 100" in write_page(tmp_path, state="running").read_text()


def test_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    SyntheticRun(tmp_path, steps=1, validations=0).write()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    page = Page(write_page(tmp_path, state="running").read_text())
    assert "No step" in page.text
    assert not {"course", "use"} & {each["id"] for each in page.all("section")}


def test_adapter_of_the_newest_checkpoint_is_named_before_the_final_one_exists(tmp_path: Path) -> None:
    SyntheticRun(tmp_path).write()
    own = tmp_path / "pytorch_lora_weights.safetensors"
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        shutil.copy(own, tmp_path / f"checkpoint-{step}")
    assert f"--adapter {own} " in code_of(write_page(tmp_path).read_text(), "use-command")
    own.unlink()
    html = write_page(tmp_path).read_text()
    assert f"--adapter {tmp_path}/checkpoint-10/{own.name} " in code_of(html, "use-command")
    assert "of checkpoint-10, the newest so far" in Page(html).text


def test_the_file_of_a_token_stands_before_the_adapter_of_an_earlier_run(tmp_path: Path) -> None:
    SyntheticRun(tmp_path).write()
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"x")
    assert read_run(tmp_path).adapter == tmp_path / "pytorch_lora_weights.safetensors"
    config = json.loads((tmp_path / CONFIG_FILE).read_bytes())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"model_type": "embedding"}))
    assert read_run(tmp_path).adapter == tmp_path / "learned_embeds.safetensors"


def test_paths_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SyntheticRun(tmp_path / "output" / "mine").write()
    monkeypatch.chdir(tmp_path)
    html = write_page(tmp_path / "output" / "mine").read_text()
    assert "'output/mine/pytorch_lora_weights.safetensors'" in code_of(html, "use-python")
    assert str(tmp_path) not in html


def test_snippet_is_valid_python_with_the_changed_settings(tmp_path: Path) -> None:
    changed = {"prediction_type": "v_prediction", "revision": "fp16", "lora_type": "standard"}
    html = html_of(SyntheticRun(tmp_path, config={**changed, "validation_negative_prompt": NASTY}))
    code = code_of(html, "use-python")
    compile(code, "snippet", "exec")
    for part in ("prediction_type='v_prediction'", "revision='fp16'", "load_peft_into_pipeline(pipeline"):
        assert part in code
    assert f"negative_prompt={NASTY!r}" in code


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match=CONFIG_FILE):
        write_page(tmp_path)


def test_command_needs_no_torch(tmp_path: Path, repository: Path) -> None:
    folder = SyntheticRun(tmp_path).write()
    script = (
        "import sys\nfrom simpletuner import cli\n"
        f"sys.argv = ['simpletuner', 'report', {str(folder)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == str(folder / "report.html")


# Images.


def test_images_are_in_step_order_after_the_base_model(html: str) -> None:
    alts = [each["alt"] for each in Page(html).all("img")]
    columns = ("base model", "step 25", "step 50")
    expected = [f"{prompt}, {column}, 32x32, seed 1" for prompt in (NASTY, "a dog") for column in columns]
    assert alts == expected


def test_image_of_another_adapter_is_between(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, prompts=("a dog",), validations=1)
    run.write()
    facts = json.loads((tmp_path / "run.json").read_bytes())
    facts["shots"][0]["other"] = facts["shots"][0]["base"]
    run.json("run.json", facts | {"compared_with": "LoRA"})
    alts = [str(each["alt"]) for each in Page(write_page(tmp_path).read_text()).all("img")]
    assert [alt.split(", ")[1] for alt in alts] == ["base model", "LoRA", "step 50"]


def test_image_of_the_average_is_beside_that_of_the_trained_weights(tmp_path: Path) -> None:
    SyntheticRun(tmp_path, prompts=("a dog",), config={"use_ema": True}).write()
    for folder in (tmp_path / "validation").glob("step-*"):
        (folder / "ema").mkdir()
        for image in folder.glob("*.png"):
            shutil.copy(image, folder / "ema")
    beside = tmp_path / "pytorch_lora_weights.ema.safetensors"
    beside.write_bytes(b"")
    (tmp_path / "validation" / "step-50" / "scores.json").write_text(
        json.dumps({"clip_score": {"a": 20.0}, "ema_clip_score": {"a": 30.0}})
    )
    html = write_page(tmp_path).read_text()
    alts = [str(each["alt"]) for each in Page(html).all("img")]
    assert [alt.removeprefix("a dog, ").rpartition(", 32x32")[0] for alt in alts] == [
        "base model", "step 25", "step 25, EMA", "step 50", "step 50, EMA"
    ]  # fmt: skip
    assert str(beside) in Page(html).text
    run = read_run(tmp_path)
    assert (run.clip_scores, run.ema_clip_scores) == ({50: 20.0}, {50: 30.0})
    assert "mean of the EMA images" in html


def series_of(file: Path) -> list[tuple[str | None, str | None]]:
    """What each column of the table is of: its series and its step."""
    heads = Page(file.read_text(encoding="utf-8")).all("th")
    return [(each["data-series"], each.get("data-step")) for each in heads if "data-series" in each]


def test_images_of_other_runs_are_beside_those_of_the_same_prompt_and_seed(tmp_path: Path) -> None:
    mine, other, third = (tmp_path / name for name in ("mine", "日本", "third"))
    SyntheticRun(mine, prompts=("a dog",)).write()
    SyntheticRun(other, prompts=("a dog", "a bird"), steps=30).write()
    SyntheticRun(third, prompts=("a fish",), validations=1).write()
    own = [("base model", None), ("this run", "25"), ("this run", "50")]
    assert series_of(write_page(mine)) == own
    before = (mine / "report.html").read_bytes()
    page = write_page(mine, others=[other, third])
    assert page == mine / "report-with-日本-third.html"
    assert series_of(page) == [*own, ("日本", "15"), ("日本", "30")]
    text = page.read_text(encoding="utf-8")
    assert "third has no image of a prompt, size, seed and strength here." in text
    assert "a bird" not in text
    assert (mine / "report.html").read_bytes() == before, "the running run's own page"


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [tmp_path / place / "run" for place in ("a", "b", "c")]
    for run in runs:
        SyntheticRun(run, prompts=("a dog",), validations=1).write()
    shown = series_of(write_page(runs[0], others=runs[1:]))
    assert [name for name, _ in shown] == ["base model", "this run", *map(display_path, runs[1:])]


def test_images_of_a_compared_run_have_their_share_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    SyntheticRun(mine, steps=60, validations=6, prompts=("a dog",)).write()
    SyntheticRun(other, steps=90, validations=9, prompts=("a dog",)).write()
    one = gallery.thumbnail(next((mine / "validation" / "base").glob("*.png")), -2)
    monkeypatch.setattr(gallery, "BUDGET_BYTES", one.num_bytes * 5)
    page = write_page(mine, others=[other])
    assert [step for _, step in series_of(page)] == [None, "10", "60", "10", "90"]
    assert "4 validations left out" in page.read_text()
    assert "7 validations of other left out" in page.read_text()


def test_images_of_another_size_stay_on_the_page(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, prompts=("a dog",), picture_px=48)
    run.write()
    run.picture_px = 32
    run.write()
    alts = [str(each["alt"]) for each in Page(write_page(tmp_path).read_text()).all("img")]
    assert [alt.rpartition(", seed")[0] for alt in alts] == [
        f"{prompt}, {title}, {size}"
        for prompt, size in (("a dog", "32x32"), ("prompt", "48x48"))
        for title in ("base model", "step 25", "step 50")
    ]


def test_damaged_image_leaves_its_cell_empty(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, prompts=("a dog",))
    next((run.write() / "validation" / "step-25").glob("*.png")).write_bytes(b"no image")
    page = Page(write_page(tmp_path).read_text())
    assert len(page.all("img")) == 2
    assert len([each for each in page.all("span") if each.get("class") == "missing"]) == 1


def test_large_images_are_scaled_and_small_ones_kept_lossless(tmp_path: Path) -> None:
    for edge, shown, image_format in ((1024, 448, "jpeg"), (64, 64, "png")):
        file = tmp_path / f"{edge}.png"
        Image.new("RGB", (edge, edge // 2), "red").save(file)
        image = gallery.thumbnail(file, 0)
        assert (image.width, image.height) == (shown, shown // 2)
        assert image.uri.startswith(f"data:image/{image_format};base64,")


@pytest.mark.parametrize(
    ("count", "kept"),
    [(2, [1, 9]), (3, [1, 5, 9]), (5, [1, 3, 5, 7, 9]), (9, list(range(1, 10))), (20, list(range(1, 10)))],
)
def test_kept_steps_are_first_last_and_evenly_spaced(count: int, kept: list[int]) -> None:
    assert gallery.spread_evenly(range(1, 10), count) == kept


def test_images_beyond_the_budget_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SyntheticRun(tmp_path, steps=60, validations=6, prompts=("a dog", "a cat"))
    html = html_of(run)
    one = gallery.thumbnail(next((tmp_path / "validation" / "base").glob("*.png")), -1)
    monkeypatch.setattr(gallery, "BUDGET_BYTES", one.num_bytes * 2 * 4)  # base and three steps of two prompts
    fewer = write_page(tmp_path).read_text()
    assert len(Page(html).all("img")) == 2 * 7
    assert [str(each["alt"]).split(", ")[1] for each in Page(fewer).all("img")[:4]] == [
        "base model", "step 10", "step 30", "step 60",
    ]  # fmt: skip
    assert "step 20, 40, 50." in Page(fewer).text
    monkeypatch.setattr(gallery, "BUDGET_BYTES", one.num_bytes * 3)
    assert "1 prompt left out" in Page(write_page(tmp_path).read_text()).text


def test_report_of_a_long_run_with_many_images_stays_small(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path, steps=100_000, validations=50, picture_px=512)
    folder = run.write()
    started_s = time.process_time()
    file = write_page(folder)
    took_s = time.process_time() - started_s
    assert file.stat().st_size < 20_000_000
    assert took_s < 20, "4 s of CPU time on an idle machine"
    page = Page(file.read_text())
    assert "validations left out" in page.text
    assert max(len(json.loads(each)["x"]) for each in page.scripts[:-1]) <= 1001


# Keeping it up to date.


def test_unwritable_page_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    SyntheticRun(tmp_path).write()

    def no_space(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_page", no_space)
    with caplog.at_level(logging.WARNING):
        assert RunPage(tmp_path, is_enabled=True).write("finished") is None
    assert "OSError: [Errno 28] No space left" in caplog.text


def test_page_takes_at_most_two_per_cent_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    clock = iter([0.0, 0.0, 2.0, 2.0, 99.0, 110.0, 110.0, 112.0, 112.0])  # each page takes 2 s, 2 % are 100 s
    monkeypatch.setattr(writer, "write_page", lambda folder, **_: made.append(folder))
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(clock))
    page = RunPage(tmp_path, is_enabled=True)
    for _ in range(3):
        page.refresh()
    assert len(made) == 2


@pytest.mark.parametrize(("took_s", "after_s"), [(0.0, 60.0), (0.25, 60.0), (2.0, 400.0)])
def test_old_page_of_a_running_run_is_written_again_without_anything_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took_s: float, after_s: float
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(writer, "write_page", lambda *_, **__: clock.append(1000.0 + took_s))
    monkeypatch.setattr(writer.time, "monotonic", lambda: clock[-1])
    page, other = RunPage(tmp_path, is_enabled=True), RunPage(tmp_path, is_enabled=False)
    page.refresh()
    for age_s, is_old in ((after_s - 1.0, False), (after_s, True)):
        clock.append(1000.0 + age_s)
        assert page.is_old is is_old
        assert not other.is_old


def test_running_page_has_the_step_of_the_state_and_not_of_the_log(tmp_path: Path) -> None:
    SyntheticRun(tmp_path, steps=12).write()
    file = RunPage(tmp_path, is_enabled=True, step=lambda: 17).write("running")
    assert file is not None
    assert "running at step 17 of 24" in file.read_text()


def test_other_processes_write_no_page(tmp_path: Path) -> None:
    SyntheticRun(tmp_path).write()
    page = RunPage(tmp_path, is_enabled=False)
    page.refresh()
    assert page.write("finished") is None
    assert not (tmp_path / "report.html").exists()


# In a browser.

PROBE = """
window.addEventListener("error", (event) => errors.push(event.message));
document.addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
"""
QUESTIONS = """
const field = document.querySelector(".field");
const box = field.getBoundingClientRect();
const place = {clientX: box.left + box.width / 2, clientY: box.top + 5, bubbles: true};
field.dispatchEvent(new PointerEvent("pointermove", place));
const values = [...document.querySelector("figcaption").querySelectorAll(".key b")];
const during = values.map((each) => each.textContent);
field.dispatchEvent(new PointerEvent("pointerleave", place));
const after = values.map((each) => each.textContent);
document.querySelector(".pictures img").click();
const alt = document.querySelector("dialog[open] img").alt;
document.querySelector("dialog").close();
const alts = () => [...document.querySelectorAll(".viewer figure img")].slice(0, 2).map((each) => each.alt);
const viewer = [alts()];
const [left] = document.querySelectorAll(".viewer select");
const [, slider] = document.querySelectorAll(".viewer input[type=range]");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
viewer.push(alts());
left.value = "this run";
left.dispatchEvent(new Event("change"));
viewer.push(alts());
parent.postMessage(JSON.stringify({
  errors, during, after, alt, viewer,
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  broken: [...document.images].filter((each) => each.src && !each.naturalWidth).length,
}), "*");
"""


def asked_in_browser(folder: Path, html: str, *, questions: str, width: int = 1280) -> list[Any]:
    """The JSON that a script at the end of the page sends to its parent, at each time it is loaded."""
    before, after = f"const errors = [];{PROBE}", questions
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (before, after)]
    probed = html.replace("script-src", "script-src " + " ".join(f"'sha256-{each}'" for each in hashes), 1)
    probed = probed.replace("<style>", f"<script>{before}</script><style>", 1)
    probed = probed.replace("</body>", f"<script>{after}</script></body>")
    (folder / "page.html").write_text(probed)
    # A window is at least 500 px wide; a frame has any width.
    outer = folder / "outer.html"
    outer.write_text(
        f'<iframe src="page.html" width="{width}" height="900" frameborder="0"></iframe>'
        "<script>const all = [];"
        "onmessage = (event) => { all.push(event.data); document.title = `[${all}]`; }</script>"
    )
    shown = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"),
            f"--user-data-dir={folder / 'profile'}",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    title = shown.partition("<title>")[2].partition("</title>")[0]
    answers: list[Any] = json.loads(Page(f"<p>{title}</p>").text)
    return answers


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_shows_the_page_without_an_error_or_sideways_scrolling(
    tmp_path: Path, html: str, width: int
) -> None:
    (found,) = asked_in_browser(tmp_path, html, questions=QUESTIONS, width=width)
    assert found["errors"] == []
    assert found["broken"] == 0
    assert found["width"] == width
    assert found["scroll"] <= width
    assert int(found["during"][-1]) in range(20, 31)
    assert float(found["during"][0]) == pytest.approx(record(int(found["during"][-1]))["loss"], rel=1e-3)
    assert found["after"][-1] == "50"
    assert found["alt"] == f"{NASTY}, base model, 32x32, seed 1"
    sides = [[alt.removeprefix(f"{NASTY}, ").split(", ")[0] for alt in alts] for alts in found["viewer"]]
    assert sides == [["base model", "step 50"], ["base model", "step 25"], ["step 25", "step 25"]]


VIEW = """
const [left] = document.querySelectorAll(".viewer select");
if (performance.getEntriesByType("navigation")[0].type !== "reload") {
  left.value = "this run";
  left.dispatchEvent(new Event("change"));
  const [slider] = document.querySelectorAll(".viewer input[type=range]");
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  document.querySelector("details").open = true;
  scrollTo(0, 700);
}
setTimeout(() => parent.postMessage(JSON.stringify({
  errors, scroll: scrollY, open: document.querySelector("details").open,
  sides: [...document.querySelectorAll(".viewer output")].map((each) => each.textContent),
}), "*"), 300);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_loads_the_page_of_a_running_run_again_and_shows_it_as_it_was_left(tmp_path: Path) -> None:
    SyntheticRun(tmp_path / "run").write()
    html = write_page(tmp_path / "run", state="running").read_text(encoding="utf-8")
    views = asked_in_browser(
        tmp_path, html.replace('data-reload="60"', 'data-reload="1"'), questions=VIEW, width=700
    )
    assert len(views) >= 2, "it was not loaded again"
    assert views[0] == {"errors": [], "scroll": 700, "open": True, "sides": ["step 25", "step 50"]}
    assert all(view == views[0] for view in views)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_loads_the_page_of_a_finished_run_once(tmp_path: Path, html: str) -> None:
    assert len(asked_in_browser(tmp_path, html, questions=VIEW)) == 1


def test_page_of_a_running_run_is_loaded_again_and_no_other(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        SyntheticRun(tmp_path / name).write()
    running = Page(write_page(tmp_path / "mine", state="running").read_text())
    assert [each["data-reload"] for each in running.all("span") if "data-reload" in each] == ["60"]
    for page in (
        write_page(tmp_path / "mine", state="finished"),
        write_page(tmp_path / "mine", state="running", others=[tmp_path / "other"]),
    ):
        assert 'data-reload="' not in page.read_text()


def test_path_on_another_drive_is_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", refuse)
    assert relative_path(Path("D:/runs/mine")) == "D:/runs/mine"


def test_losses_of_held_out_images_and_their_gap_are_drawn(tmp_path: Path) -> None:
    folder = SyntheticRun(tmp_path / "run").write()
    rows = [
        {
            "step": step,
            "eval_loss": 0.5 + step / 1000,
            "eval_train_loss": 0.5 - step / 1000,
            "eval_loss_by_band": dict.fromkeys(BANDS, 0.75),
            "eval_train_loss_by_band": dict.fromkeys(BANDS, 0.5),
        }
        for step in (0, 10, 20)
    ]
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = Page(write_page(folder).read_text(encoding="utf-8"))
    readings = [json.loads(each) for each in page.scripts[:-1]]
    assert {"x": [0, 10, 20], "y": [[0.5, 0.49, 0.48], [0.5, 0.51, 0.52]]} in readings
    gaps = [[0.25] * 3, [0.25] * 3, [0.25] * 3, [0, 0.02, 0.04]]
    assert {"x": [0, 10, 20], "y": gaps} in readings
    assert "Loss of held-out images" in page.text
    assert "What it grows by is overfitting" in page.text


def test_page_of_a_run_without_held_out_images_has_no_chart_of_them(html: str) -> None:
    assert "held-out" not in html


def test_a_url_is_displayed_as_it_is() -> None:
    assert display_path("s3://bucket/cats") == "s3://bucket/cats"
