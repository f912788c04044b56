"""Requests to a run: found once a second, answered, removed, and never the end of the run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simpletuner.helpers.checkpointing import requests
from simpletuner.helpers.checkpointing.requests import Answer, RequestError, RunRequests, ask, remove_requests
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.redaction import hide

ANSWERS = {
    "save": Answer("saved"),
    "sample": Answer("no prompts", is_done=False),
    "stop": Answer("stopped"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunRequests]:
    """The requests to a run that goes on, which looks for them each time."""
    monkeypatch.setattr(requests, "SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(requests, "POLL_S", 0.005)
    with run_lock(tmp_path):
        yield RunRequests(output_dir=tmp_path)


def files(run: RunRequests) -> list[str]:
    folder = run.output_dir / "requests"
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def put(run: RunRequests, name: str, content: bytes) -> Path:
    file = run.output_dir / "requests" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def answering(run: RunRequests, *, until: Callable[[], bool]) -> None:
    """Take steps that answer, until the asker has what it wants."""
    while not until():
        if run.wanted():
            run.answer(ANSWERS)
        time.sleep(0.005)


def asked(run: RunRequests, request: requests.Request) -> str | RequestError:
    """What a person is told who asks a run that takes steps."""
    told: list[str | RequestError] = []

    def wait() -> None:
        try:
            told.append(ask(run.output_dir, request))
        except RequestError as error:
            told.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    answering(run, until=lambda: bool(told))
    thread.join()
    return told[0]


def test_answer_of_the_run_reaches_the_asker_and_nothing_stays(run: RunRequests) -> None:
    assert asked(run, "save") == "saved"
    assert files(run) == []


def test_answer_holds_no_value_of_the_environment(run: RunRequests) -> None:
    hide("my-secret-folder", "{env:PLACE}")
    put(run, "sample-1.json", b'{"request": "sample", "waits": true}')
    run.wanted()
    run.answer({**ANSWERS, "sample": Answer("Images: my-secret-folder/grid.png")})
    text = (run.output_dir / "requests" / "sample-1.answer.json").read_text()
    assert "{env:PLACE}/grid.png" in text
    assert "my-secret-folder" not in text


def test_request_that_cannot_be_fulfilled_is_an_error_with_the_reason(run: RunRequests) -> None:
    assert str(asked(run, "sample")) == "no prompts"
    assert files(run) == []


def test_asker_that_does_not_wait_gets_no_answer_file(run: RunRequests) -> None:
    assert "next optimiser step" in ask(run.output_dir, "stop", is_waiting=False)
    assert run.wanted() == {"stop"}
    run.answer(ANSWERS)
    assert files(run) == []
    assert run.wanted() == frozenset()


def test_two_requests_at_once_are_found_and_answered_together(run: RunRequests) -> None:
    for request in ("save", "sample", "save"):
        ask(run.output_dir, request, is_waiting=False)
    assert run.wanted() == {"save", "sample"}
    run.answer(ANSWERS)
    assert files(run) == []


def test_folder_is_looked_at_once_a_second_and_not_on_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    clock = [0.0]
    monkeypatch.setattr(requests, "_request_files", lambda folder: looks.append(folder) or [])
    monkeypatch.setattr(requests.time, "monotonic", lambda: clock[-1])
    run, other = RunRequests(output_dir=tmp_path), RunRequests(output_dir=tmp_path, is_enabled=False)
    for now_s, expected in ((100.0, 1), (100.9, 1), (101.0, 2), (101.5, 2)):
        clock.append(now_s)
        run.wanted()
        other.wanted()
        assert len(looks) == expected, now_s


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no json",
        b"[1]",
        b'{"request": "explode"}',
        b'{"request": ["save"]}',
        b'{"request": "save"' + b" " * 5000 + b"}",
        b"[" * 4000,
        b"\xff\xfe",
    ],
    ids=["empty", "text", "list", "unknown", "not a word", "long", "deep", "bytes"],
)
def test_unknown_request_is_refused_in_the_log_and_removed(
    run: RunRequests, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(run, "x.json", content)
    with caplog.at_level(logging.WARNING):
        assert run.wanted() == frozenset()
    assert "x.json is no request that this run knows. It knows sample, save, stop." in caplog.text
    assert files(run) == []


def test_asker_of_an_unknown_request_who_waits_is_told_what_the_run_knows(run: RunRequests) -> None:
    file = put(run, "dance-1.json", b'{"request": "dance", "waits": true}')
    run.wanted()
    assert not file.exists()
    answer = json.loads((file.parent / "dance-1.answer.json").read_bytes())
    assert answer["is_done"] is False
    assert "sample, save, stop" in answer["text"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_not_waited_for(run: RunRequests, caplog: pytest.LogCaptureFixture) -> None:
    (run.output_dir / "requests").mkdir()
    os.mkfifo(run.output_dir / "requests" / "x.json")
    with caplog.at_level(logging.WARNING):
        assert run.wanted() == frozenset()
    assert "x.json is no request" in caplog.text
    assert files(run) == []


def test_link_to_itself_does_not_hide_other_requests(run: RunRequests) -> None:
    put(run, "save-1.json", b'{"request": "save"}')
    (run.output_dir / "requests" / "loop.json").symlink_to("loop.json")
    assert run.wanted() == {"save"}
    assert files(run) == ["save-1.json"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"text": "x", "newer": 1}'])
def test_answer_that_cannot_be_read_is_told(run: RunRequests, content: bytes) -> None:
    put(run, "save-1.json", b"{}").with_name("save-1.answer.json").write_bytes(content)
    answer = requests._answer(run.output_dir / "requests" / "save-1.json")
    assert answer is not None
    assert not answer.is_done


def test_files_of_other_names_are_left(run: RunRequests) -> None:
    for name in ("notes.txt", ".partial_host_1_0123abcd", "save-1.answer.json"):
        put(run, name, b'{"request": "stop"}')
    (run.output_dir / "requests" / "folder.json").mkdir()
    assert run.wanted() == frozenset()
    assert len(files(run)) == 4


def test_request_that_cannot_be_removed_is_fulfilled_once(
    run: RunRequests, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask(run.output_dir, "save", is_waiting=False)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    assert run.wanted() == {"save"}
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "unlink", refuse)
        run.answer(ANSWERS)
    assert "cannot be removed" in caplog.text
    assert run.wanted() == frozenset()


def test_folder_that_cannot_be_read_costs_one_warning(
    run: RunRequests, caplog: pytest.LogCaptureFixture
) -> None:
    (run.output_dir / "requests").write_bytes(b"a file in the way")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert run.wanted() == frozenset()
    assert caplog.text.count("Requests to this run cannot be read") == 1


def test_folder_that_cannot_be_written_is_an_error_that_names_it(run: RunRequests) -> None:
    (run.output_dir / "requests").write_bytes(b"a file in the way")
    with pytest.raises(StorageError, match="requests"):
        ask(run.output_dir, "save")


def test_wait_ends_when_the_run_does_and_the_request_is_withdrawn(
    run: RunRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "is_held", lambda _: False)
    with pytest.raises(RequestError, match="ended before it answered"):
        ask(run.output_dir, "save")
    assert files(run) == []


def test_wait_ends_when_the_output_folder_is_deleted(
    run: RunRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def delete(text: str) -> None:
        told.append(text)
        shutil.rmtree(run.output_dir)

    monkeypatch.setattr(requests, "QUIET_S", 0.0)
    with pytest.raises(RequestError, match="ended before"):
        ask(run.output_dir, "save", say=delete)
    assert told == ["Waiting for the run's next optimiser step. Ctrl-C withdraws the request."]


def test_interrupted_wait_withdraws_the_request(run: RunRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "QUIET_S", 0.0)

    def interrupt(_: str) -> None:
        assert len(files(run)) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(run.output_dir, "stop", say=interrupt)
    assert files(run) == []


def test_request_that_was_withdrawn_while_it_was_fulfilled_gets_no_answer(run: RunRequests) -> None:
    ask(run.output_dir, "save", is_waiting=False)
    run.wanted()
    shutil.rmtree(run.output_dir / "requests")
    run.answer(ANSWERS)
    assert files(run) == []


def test_start_removes_what_a_dead_run_left_with_a_line(
    run: RunRequests, caplog: pytest.LogCaptureFixture
) -> None:
    put(run, "stop-1.json", b"{}")
    put(run, "save-2.answer.json", b"{}")
    put(run, "notes.txt", b"")
    (run.output_dir / "requests" / "folder.json").mkdir()
    with caplog.at_level(logging.INFO):
        remove_requests(run.output_dir)
    assert "Removed 1 request to an earlier run, which ended before it answered: stop-1.json." in caplog.text
    assert files(run) == ["folder.json", "notes.txt"]


def test_start_without_requests_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        remove_requests(tmp_path)
    assert caplog.text == ""
