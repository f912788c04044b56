"""The page that real runs leave: finished, stopped and failed ones, and that it never costs the run."""

from __future__ import annotations

import json
import logging
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner import cli
from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.reporting.html_report import writer
from simpletuner.helpers.reporting.html_report.folder import read_run
from simpletuner.helpers.reporting.run_summary import load_summary
from simpletuner.helpers.reporting.trackers import JsonLines
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.synthetic_run import Page, code_of
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

PROMPT = 'a "photo" of <b>sks</b> cat'
PICTURES = {
    "validation_disable": False,
    "validation_prompt": PROMPT,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
    "validation_guidance": 5.0,
    "validation_step_interval": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run of three steps with pictures, its prompt and a caption full of markup."""
    run = TinyRun(tmp_path_factory.mktemp("finished"), num_images=4)
    (run.folder / "images" / "image0.txt").write_text("</script><script>alert(1)</script>")
    (run.folder / "images" / "image9.png").write_bytes(b"no picture")
    assert run.run(max_train_steps=3, learning_rate=0.05, **PICTURES) == 0
    return run


def html_of(run: TinyRun) -> str:
    return (run.output_dir / "report.html").read_text(encoding="utf-8")


def picture_of(run: TinyRun, step: int) -> np.ndarray:
    files = (run.output_dir / "validation" / f"step-{step}").glob("0*.png")
    return np.asarray(Image.open(next(files))).astype(int)


def test_finished_run_leaves_a_page_that_says_so(finished: TinyRun) -> None:
    page = Page(html_of(finished))
    assert "finished, 3 steps" in page.text
    report = load_summary(finished.output_dir)
    assert report is not None
    assert report.page == str(finished.output_dir / "report.html")
    assert [str(each["alt"]).split(", ")[1] for each in page.all("img")] == ["base model", "step 2", "step 3"]
    for words in ("</script><script>alert(1)</script>", "image9.png", "From 8 ranks at the clean image to 2"):
        assert words in page.text
    assert "alert(1)</script>" not in html_of(finished)


def test_settings_that_the_family_gives_are_at_their_default(finished: TinyRun) -> None:
    changed = json.loads((finished.output_dir / "run.json").read_bytes())["changed_keys"]
    assert {"learning_rate", "model_family", "validation_guidance"} <= set(changed)
    assert not {"peft_lora_target_modules", "model_flavour", "lora_rank"} & set(changed)


def test_log_tells_the_noise_bands_apart_and_holds_memory(finished: TinyRun) -> None:
    lines = [json.loads(line) for line in (finished.output_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        known = [loss for loss in line["loss_by_band"].values() if loss is not None]
        assert min(known) <= line["loss"] <= max(known)
        assert line["memory_mib"] > 100
        assert line["device_memory_mib"] is None or torch.cuda.is_available()
    assert any(len(set(line["loss_by_band"].values())) > 1 for line in lines)


def test_snippet_on_the_page_makes_the_last_validation_picture(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_of(html_of(finished), "use-python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {})
    made = np.asarray(Image.open(tmp_path / "image.png")).astype(int)
    assert np.abs(made - picture_of(finished, 3)).max() <= 1
    assert np.abs(made - picture_of(finished, 2)).max() > 3


def test_command_on_the_page_makes_the_last_validation_picture(
    finished: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(code_of(html_of(finished), "use-command").replace("\\\n", ""))
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    made = np.asarray(Image.open(capsys.readouterr().out.strip())).astype(int)
    assert np.abs(made - picture_of(finished, 3)).max() <= 1


def test_page_is_made_again_from_the_folder_alone(
    finished: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = html_of(finished)
    (finished.output_dir / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["simpletuner", "report", str(finished.output_dir)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert capsys.readouterr().out.strip() == str(finished.output_dir / "report.html")
    as_of = "as of "
    assert html_of(finished).partition(as_of)[0] == before.partition(as_of)[0]
    assert html_of(finished).partition(as_of)[2][20:] == before.partition(as_of)[2][20:]


def test_page_of_a_run_in_progress_says_so_and_of_a_stopped_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRun(tmp_path)
    seen: list[str] = []
    save = Trainer.save_checkpoint

    def stop_after_two(trainer: Trainer) -> Path:
        seen.append(html_of(run))
        assert read_run(run.output_dir).state == "running"
        trainer.preemption.requested = trainer.progress.step >= 2
        return save(trainer)

    monkeypatch.setattr(Trainer, "save_checkpoint", stop_after_two)
    monkeypatch.setattr(writer, "LARGEST_SHARE", math.inf)  # never too often
    assert run.run(checkpoint_step_interval=1, train_batch_size=1) == 75
    assert "running at step 0 of 4" in seen[0]
    assert "running at step 1 of 4" in seen[1]
    assert "stopped at step 2 of 4" in html_of(run)
    assert "checkpoint-2" in code_of(html_of(run), "use-command")


@pytest.mark.reliability_row(5)
def test_page_counts_steps_by_the_state_where_the_log_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JsonLines, "log", lambda *_: None)  # as on a disk that stays full
    apply_gradients = Trainer.apply_gradients

    def fail_at_the_third_step(trainer: Trainer) -> None:
        if trainer.progress.step == 2:
            raise TrainingError("no gradient")
        apply_gradients(trainer)

    monkeypatch.setattr(Trainer, "apply_gradients", fail_at_the_third_step)
    run = TinyRun(tmp_path)
    with pytest.raises(TrainingError):
        run.run(checkpoint_step_interval=0)
    assert "failed at step 2 of 4" in html_of(run)


def test_page_of_a_failed_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TinyRun(tmp_path)

    def fail(trainer: Trainer) -> None:
        raise TrainingError("no gradient")

    monkeypatch.setattr(Trainer, "apply_gradients", fail)
    with pytest.raises(TrainingError):
        run.run()
    assert "failed at step 0 of 4" in html_of(run)


def test_page_that_cannot_be_written_costs_a_warning_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TinyRun(tmp_path)
    (run.output_dir / "report.html").mkdir(parents=True)
    (run.output_dir / "report.html" / "in the way").touch()
    with caplog.at_level(logging.WARNING):
        assert run.run(max_train_steps=1) == 0
    assert "The report was not written: StorageError" in caplog.text
    report = load_summary(run.output_dir)
    assert report is not None
    assert report.page is None
