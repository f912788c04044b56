"""Uploads in the background: they end with the run, within a bound, and what is left is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.run_folder import EMA_ADAPTER_FILE, EMA_EMBEDDING_FILE, EMBEDDING_FILE
from simpletuner.helpers.publishing import uploads as background
from simpletuner.helpers.publishing.run_files import read_run
from simpletuner.helpers.publishing.uploads import Uploads, check_login
from tests.hub_server import HubServer
from tests.unit.publishing.conftest import write_adapter, write_run

ADAPTER = "pytorch_lora_weights.safetensors"
REPOSITORY = "somebody/simpletuner"


@pytest.fixture
def processes(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The server, for processes that this one starts too."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def waits_until(happens: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Wait for something that another process does."""
    deadline_s = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_run_that_ends_waits_for_its_upload(
    run: Path, processes: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    with Uploads(output_dir=run, is_enabled=True, repository="simpletuner", public=True) as uploads:
        uploads.request()
    assert ADAPTER in processes.repos[REPOSITORY].files
    assert not processes.repos[REPOSITORY].private
    assert not warnings(caplog)


@pytest.mark.parametrize("stopped_by", ["the bound", "a signal", "an error"])
def test_an_upload_that_hangs_ends_with_the_run_and_is_named_with_its_command(
    stopped_by: str, run: Path, processes: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    processes.hangs = "commit"
    uploads = Uploads(
        output_dir=run,
        is_enabled=True,
        wait_s=0.5 if stopped_by == "the bound" else 60.0,
        should_stop=lambda: stopped_by == "a signal",
    )
    try:
        with uploads:
            uploads.request()
            waits_until(lambda: any("/commit/" in each for each in processes.requests))
            process, started_s = uploads._process, time.monotonic()
            if stopped_by == "an error":
                raise InterruptedError
    except InterruptedError:
        pass
    assert time.monotonic() - started_s < 4.0
    assert process is not None
    assert process.wait(5) != 0
    [warning] = warnings(caplog)
    assert f"simpletuner publish {run}" in warning


def test_a_failed_upload_is_named_with_its_command_and_a_later_one_makes_up_for_it(
    run: Path, processes: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    processes.failures["commit"] = [400]
    with Uploads(output_dir=run, is_enabled=True) as uploads:
        uploads.request()
        waits_until(lambda: warnings(caplog))
        uploads.request()
    assert ADAPTER in processes.repos[REPOSITORY].files
    assert f"simpletuner publish {run}" not in caplog.text
    caplog.clear()
    processes.failures["whoami"] = [400]
    with Uploads(output_dir=run, is_enabled=True) as uploads:
        uploads.request()
    assert f"simpletuner publish {run}" in warnings(caplog)[-1]


def test_a_checkpoint_may_be_removed_while_its_adapter_waits(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 2)
    uploads = Uploads(output_dir=run, is_enabled=True, with_checkpoints=True)
    for step in (2, 4, 6, 10):
        adapter = run / f"checkpoint-{step}" / ADAPTER
        write_adapter(adapter, steps=step)
        uploads.add_checkpoint(step)
        content = adapter.read_bytes()
        adapter.unlink()
        assert (run / "hub" / f"checkpoint-{step}" / ADAPTER).read_bytes() == content
    assert sorted(path.name for path in (run / "hub").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-6",
    ]
    assert uploads._is_wanted
    (run / "hub" / "checkpoint-10" / ADAPTER).unlink()
    write_adapter(run / "checkpoint-10" / ADAPTER)
    uploads.add_checkpoint(10)  # saved once, uploaded once
    assert not (run / "hub" / "checkpoint-10" / ADAPTER).exists()


@pytest.mark.parametrize("kind", ["lora", "embedding"])
def test_the_new_token_of_a_checkpoint_waits_with_its_adapter_or_alone(tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "token", model_type=kind, use_ema=True)
    trained = [EMBEDDING_FILE, EMA_EMBEDDING_FILE, *([ADAPTER, EMA_ADAPTER_FILE] if kind == "lora" else [])]
    for name in trained:
        write_adapter(run / "checkpoint-2" / name)
    Uploads(output_dir=run, is_enabled=True, with_checkpoints=True).add_checkpoint(2)
    assert {path.name for path in (run / "hub" / "checkpoint-2").iterdir()} == set(trained)
    assert set(read_run(run).checkpoints) == {f"checkpoint-2/{name}" for name in trained}


def test_a_checkpoint_is_not_uploaded_before_its_adapter_is_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "token")
    write_adapter(run / "hub" / "checkpoint-2" / EMBEDDING_FILE)
    assert not read_run(run).checkpoints
    write_adapter(run / "hub" / "checkpoint-2" / ADAPTER)
    assert len(read_run(run).checkpoints) == 2


@pytest.mark.parametrize(
    ("is_enabled", "with_checkpoints"), [(False, True), (True, False)], ids=["disabled", "final only"]
)
def test_nothing_waits_that_is_not_to_be_uploaded(
    run: Path, is_enabled: bool, with_checkpoints: bool
) -> None:
    write_adapter(run / "checkpoint-2" / ADAPTER)
    uploads = Uploads(output_dir=run, is_enabled=is_enabled, with_checkpoints=with_checkpoints)
    uploads.add_checkpoint(2)
    if not is_enabled:
        uploads.request()
    assert not uploads._is_wanted
    assert not (run / "hub").exists()


def test_a_checkpoint_that_cannot_wait_costs_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    Uploads(output_dir=run, is_enabled=True, with_checkpoints=True).add_checkpoint(2)
    assert len(warnings(caplog)) == 1


def test_offline_the_end_of_the_run_names_the_command(
    run: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not check_login("cat", private=True, output_dir=run)
    with Uploads(output_dir=run, is_enabled=True) as uploads:
        uploads.request()
    assert all("HF_HUB_OFFLINE" in each and "simpletuner publish" in each for each in warnings(caplog))
    assert len(warnings(caplog)) == 2
    assert not server.requests


def test_the_login_is_checked_and_the_repository_made_before_a_run(
    run: Path, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert check_login("cat", private=True, output_dir=run)
    assert server.repos["somebody/cat"].private
    assert check_login("somebody/cat", private=True, output_dir=run)
    assert not warnings(caplog)
    server.add("somebody/other", private=True)
    for _ in range(2):  # one warning: the second run goes on with its repository
        assert check_login("other", private=True, output_dir=run)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("token", "name"), [("hf_anotheranotheranother", "cat"), (None, "others/cat"), (None, "somebody/public")]
)
def test_a_login_that_may_not_upload_ends_the_run_at_its_start(
    token: str | None, name: str, run: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("somebody/public", private=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError):
        check_login(name, private=True, output_dir=run)


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_hub_without_an_answer_costs_a_warning(
    trouble: str, run: Path, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "hangs":
        server.hangs = "whoami"
    else:
        server.failures["whoami"] = [503] * 9
    assert not check_login("cat", private=True, output_dir=run, wait_s=0.5)
    [warning] = warnings(caplog)
    assert f"simpletuner publish {run}" in warning
