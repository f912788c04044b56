"""Optional packages are missed before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simpletuner.helpers.errors import MissingDependencyError
from simpletuner.helpers.training.packages import check_packages
from tests.integration.tiny_runs import TinyRun


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base_model_precision": "int8-torchao"}, "base_model_precision int8-torchao needs torchao"),
        ({"text_encoder_1_precision": "nf4-bnb"}, "text_encoder_1_precision nf4-bnb needs bitsandbytes"),
        ({"optimizer": "prodigy"}, "optimizer prodigy needs prodigyopt"),
        ({"optimizer": "AdamW8bit"}, "optimizer bnb-adamw8bit needs bitsandbytes"),
        ({"report_to": "tensorboard"}, "report_to tensorboard needs tensorboard"),
    ],
)
def test_a_package_that_will_be_needed_is_missed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], message: str
) -> None:
    config = TinyRun(tmp_path).config(**keys)
    check_packages(config)
    monkeypatch.setitem(sys.modules, message.split()[-1], None)
    with pytest.raises(MissingDependencyError, match=message):
        check_packages(config)
    with pytest.raises(MissingDependencyError, match=message):
        TinyRun(tmp_path).run(**keys)
    assert not (tmp_path / "cache").exists(), "something was encoded first"


def test_a_run_without_optional_packages_asks_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchao", "bitsandbytes", "prodigyopt", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    check_packages(TinyRun(tmp_path).config())
