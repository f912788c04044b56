"""`simpletuner init` in a real terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)

# A command that a script starts in the background ignores Ctrl-C, and what it starts inherits that.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
from simpletuner import cli
cli.main()
"""
ANSWERS = ["写真", "", "sks toy", "0", "", "short", "mine"]


@pytest.mark.parametrize("stops", [False, True], ids=["answers", "ctrl-c"])
def test_questions_are_asked_in_a_terminal_without_colours(stops: bool, tmp_path: Path) -> None:
    (tmp_path / "写真").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "写真" / "猫.png")
    master, slave = os.openpty()
    environment = {
        **os.environ,
        "TERM": "dumb",
        "NO_COLOR": "1",
        "LANG": "ja_JP.UTF-8",
        "PATH": "",
        "COLUMNS": "80",
    }
    environment.pop("LC_ALL", None)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "init"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    shown = _until(master, "画像フォルダ: ")
    if stops:
        _interrupt(process)
    else:
        os.write(master, "".join(f"{each}\n" for each in ANSWERS).encode())
    shown += _until(master, None)
    os.close(master)
    assert process.wait(timeout=60) == (1 if stops else 0), shown
    assert (tmp_path / "config" / "mine" / "config.json").exists() is not stops
    assert not list(tmp_path.glob("config/.*"))
    assert "\x1b" not in shown
    assert "Traceback" not in shown
    assert ("学習を開始するコマンド: simpletuner train mine" in shown) is not stops


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C, and again as a person would: one between the question and its reading is not noticed."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _until(terminal: int, text: str | None) -> str:
    """What a terminal shows until a text, or to its end."""
    shown = b""
    while text is None or text.encode() not in shown:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end was closed
            break
    return shown.decode("utf-8")
