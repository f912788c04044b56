"""The page of a comparison: which checkpoint is best, and what is compared with what."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from simpletuner.helpers.contracts import ComparedColumn, ComparedGroup, ComparedRow
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.reporting.compare_page.page import render_page, write_page
from tests.integration.synthetic_run import NASTY, SECRET, Page


def evaluated(folder: Path, losses: dict[int, float], *, images: int = 1) -> Path:
    """The folder of a run with these losses of held-out images."""
    folder.mkdir()
    rows = [{"step": step, "eval_loss": loss, "image_set": images} for step, loss in losses.items()]
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.resolved.json").write_text("{}")
    return folder


def columns_of(run: Path, *steps: int) -> list[ComparedColumn]:
    return [ComparedColumn(title=f"{run.name}, step {step}", run=run, step=step) for step in steps]


def group_of(*columns: ComparedColumn) -> ComparedGroup:
    base = ComparedColumn(title="base model", is_base=True, scores={"CLIP score": 99.0})
    rows = (ComparedRow("a", NASTY, "64x64, seed 1"),)
    return ComparedGroup(model="owner/model", settings="3 steps", rows=rows, columns=(base, *columns))


def sentences(group: ComparedGroup, file: Path) -> str:
    return "\n".join(write_page(file, [group]))


def test_lowest_held_out_loss_is_found_among_all_runs_with_equal_images_and_loss(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "first", {0: 0.5, 10: 0.4, 20: 0.2, 30: 0.3})
    second = evaluated(tmp_path / "second", {0: 0.50001, 10: 0.25})
    group = group_of(*columns_of(first, 10, 20, 30), *columns_of(second, 10))
    found = sentences(group, tmp_path / "page.html")
    assert "Lowest held-out loss: first, step 20 (0.20000, of 4 checkpoints)." in found
    assert "not compared" not in found
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "0.20000 best" in page.text
    assert page.text.count(" best") == 1


def test_losses_of_other_images_or_of_another_loss_are_not_compared(tmp_path: Path) -> None:
    first = evaluated(tmp_path / "first", {0: 0.5, 10: 0.4, 20: 0.3})
    weighted = evaluated(tmp_path / "weighted", {0: 0.1, 10: 0.05, 20: 0.06})
    other = evaluated(tmp_path / "other", {0: 0.5, 10: 0.2}, images=2)
    columns = (*columns_of(first, 10, 20), *columns_of(weighted, 10, 20), *columns_of(other, 10))
    found = sentences(group_of(*columns), tmp_path / "page.html")
    assert "first, step 20 (0.30000, of 2 checkpoints)" in found
    assert "weighted, step 10 (0.05000, of 2 checkpoints)" in found
    assert "other, step 10 (" not in found
    assert "not compared with each other: first, step 20; weighted, step 10; other, step 10." in found


def test_lower_loss_of_a_step_without_checkpoint_is_told(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "first", {0: 0.1, 10: 0.2, 15: 0.15, 20: 0.3})
    found = sentences(group_of(*columns_of(run, 10, 20)), tmp_path / "page.html")
    assert "first had its lowest held-out loss, 0.15000, after step 15" in found


def test_scores_have_a_best_and_the_base_model_is_none(tmp_path: Path) -> None:
    columns = [
        ComparedColumn(
            title=name, scores={"CLIP score": score, "other": min(score, 25.0), "even": 1.0}, details=details
        )
        for name, score, details in (("a", 27.0, ""), ("b", 30.0, "all ranks open"), ("c", 20.0, ""))
    ]
    found = sentences(group_of(*columns), tmp_path / "page.html")
    assert "Highest CLIP score: b, all ranks open (30)." in found
    assert "Highest other: a; b, all ranks open (25)." in found
    assert "Highest even: all 3 alike (1)." in found
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.count(" best") == 3


def test_page_is_whole_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    hide(SECRET, "{env:TOKEN}")
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "red").save(image)
    shown = ComparedColumn(title=f"{NASTY} {SECRET}", images={"a": image}, problem=f"{NASTY} is gone")
    html = render_page([group_of(shown), group_of()])
    page = Page(html)
    assert len(page.all("img")) == 1
    assert str(page.all("img")[0]["src"]).startswith("data:image/png;base64,")
    assert page.all("img")[0]["class"] == "pixels"
    assert SECRET not in html
    assert "alert" not in "".join(page.scripts)
    assert f"{NASTY} is gone" in page.text
    assert "tables of their own" in page.text
    assert page.text.count("none") >= 2


def test_run_that_is_gone_is_told(tmp_path: Path) -> None:
    page = Page(render_page([group_of(*columns_of(tmp_path / "removed", 10))]))
    assert "its log and its configuration are gone" in page.text
