"""A run that does not fit its GPU or its disks ends before anything is downloaded."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.training import preparing
from simpletuner.helpers.training.fitting import check_fit

GIB = 2**30


@pytest.fixture
def config(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000 * GIB))
    return load(tmp_path)


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    file = Path("config/examples/flux-dev-tlora/config.json")
    given = (f"output_dir={tmp_path}", "base_model_precision=no_change", "allow_cpu=true", *overrides)
    return load_config(file, overrides=given, families=specs())


def peak(config: RunConfig) -> int:
    found = estimate(config)
    assert found is not None
    return found.peak_device_bytes


@pytest.mark.parametrize(
    ("share", "outcome"), [(0.94, "fits"), (0.96, "warns"), (1.29, "warns"), (1.31, "ends")]
)
def test_the_share_of_the_memory_decides(
    config: RunConfig, share: float, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory = round(peak(config) / share)
    if outcome == "ends":
        with pytest.raises(ConfigError, match=r"base_model_precision.*skip_estimate"):
            check_fit(config, memory_bytes=memory)
    else:
        with caplog.at_level(logging.WARNING):
            check_fit(config, memory_bytes=memory)
        assert bool(caplog.records) is (outcome == "warns")


def test_caches_that_are_there_need_no_encoders(tmp_path: Path, config: RunConfig) -> None:
    own = load(
        tmp_path,
        f"cache_dir_text={tmp_path / 'text'}",
        "base_model_precision=int8-torchao",
        "enable_group_offload=true",
        "validation_disable=true",
    )
    found = estimate(own)
    assert found is not None
    assert found.peak.name == "captions"
    memory = round(found.peak_device_bytes / 1.31)
    with pytest.raises(ConfigError, match="captions"):
        check_fit(own, memory_bytes=memory)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "shard").write_bytes(b"x")
    check_fit(own, memory_bytes=memory)


def test_a_run_without_a_gpu_is_not_limited_by_memory(config: RunConfig) -> None:
    check_fit(config, memory_bytes=None)


def test_skip_estimate_only_warns(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match="GiB free"):
        check_fit(config, memory_bytes=None)
    check_fit(load(tmp_path, "skip_estimate=true"), memory_bytes=8 * GIB)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_a_full_disk_beside_a_warning_of_memory_ends_the_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match=r"of this GPU.*GiB free"):
        check_fit(config, memory_bytes=peak(config))


def test_shards_are_not_held_against_the_memory_of_one_device(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "device_memory", lambda _: GIB)
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    monkeypatch.setattr(preparing, "build_accelerator", lambda _: sharded)
    monkeypatch.setattr(preparing, "with_shared_seed", lambda config: config)
    monkeypatch.setattr(preparing, "check_distribution", lambda *_: None)
    with ExitStack() as resources, pytest.raises(ConfigError, match="allow_cpu"):  # what comes next
        preparing.prepare_run(without_cpu(config), resources)


def without_cpu(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"precision": config.precision.model_copy(update={"allow_cpu": False})})


def test_a_run_is_refused_before_its_model_is_looked_for(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "device_memory", lambda _: 8 * GIB)
    with ExitStack() as resources, pytest.raises(ConfigError, match="does not fit"):
        preparing.prepare_run(config, resources)
