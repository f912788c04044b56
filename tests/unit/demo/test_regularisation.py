"""The measurement of regularisation: what its runs share, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.demo.regularisation import MEASURES, METHODS, NUM_CLASS_IMAGES, Run, report, run_config
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.models import registry


@pytest.mark.parametrize("method", METHODS)
def test_every_run_takes_as_many_steps_on_the_subject(method: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "class" / "a.png")
    (tmp_path / "class" / "a.txt").write_text("a toy")
    values = run_config(Run(method, "robot", 3), folder=tmp_path, class_images=tmp_path / "class")
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path / "config.json", families=registry.specs())
    subject, *others = config.datasets
    assert [each.is_regularisation_data for each in others] == ([] if method == "none" else [True])
    assert subject.repeats + 1 == NUM_CLASS_IMAGES
    assert config.training.max_train_steps == 160 * (1 + len(others))
    assert config.regularisation.regularisation_target == (method if others else "base")


def test_the_table_pairs_the_runs() -> None:
    records = {
        name: [dict.fromkeys(MEASURES, value) for value in (0.25, 0.75)] for name in ("no adapter", *METHODS)
    }
    records["data"] = [dict.fromkeys(MEASURES, value + 0.125) for value in (0.25, 0.75)]
    *_, base, data = report(records)
    assert base.count("0.000 [0.000, 0.000]") == len(MEASURES)
    assert data.count("0.125 [0.125, 0.125]") == len(MEASURES)
