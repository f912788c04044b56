"""The commands run where POSIX's modules, signals and flags are missing, as they are on Windows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.helpers.io.run_folder import ADAPTER_FILE, METRICS_FILE, SUMMARY_FILE
from tests.integration import processes
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.xdist_group("processes")

# What Windows lacks is hidden from the package alone: libraries take another path there, which is not here.
SCRIPT = """
import asyncio, builtins, json, os, signal, sys

for name in [name for name in sys.modules if name.startswith("simpletuner")]:
    del sys.modules[name]  # to be imported again, without what is missing

MISSING = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "O_DIRECTORY", "O_NONBLOCK"}
imported = builtins.__import__

def is_own(names):
    return names.get("__name__", "").startswith("simpletuner")

def without_posix(name, globals=None, locals=None, fromlist=(), level=0):
    if MISSING & {name, *(fromlist or ())} and is_own(globals or {}):
        raise ImportError(name)
    return imported(name, globals, locals, fromlist, level)

builtins.__import__ = without_posix
for name in ("SIGUSR1", "SIGHUP"):
    delattr(signal, name)
opened, killed = os.open, os.kill

def open_file(path, *rest, **keywords):
    if os.path.isdir(path) and is_own(sys._getframe(1).f_globals):
        raise PermissionError(13, "a folder cannot be opened")
    return opened(path, *rest, **keywords)

def kill(pid, number):
    assert number != 0, "Windows would send it as Ctrl-C"
    killed(pid, number)

os.open, os.kill = open_file, kill

from simpletuner import cli

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["simpletuner", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
print("all ran")
"""


def test_commands_run_without_what_only_posix_has(tmp_path: Path) -> None:
    run = TinyRun(tmp_path)
    run.config(
        max_train_steps=2,
        checkpoint_step_interval=1,
        checkpoints_total_limit=1,
        validation_disable=False,
        validation_prompt="a cat",
        validation_num_inference_steps=1,
    )
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)
    adapter = str(run.output_dir / ADAPTER_FILE)
    small = ["--size", "64x64", "--steps", "1", "--prompt", "a cat"]
    commands = [
        ["validate", "--config", "config.json"],
        ["train", "--config", "config.json"],
        ["train", "--config", "config.json", "max_train_steps=3"],
        ["inspect", adapter],
        ["export", adapter, "--output", str(tmp_path / "exported.safetensors")],
        ["sample", adapter, *small, "--output", str(tmp_path / "samples")],
        ["report", str(run.output_dir)],
    ]
    process = processes.start(script, json.dumps(commands), cwd=tmp_path)
    assert process.wait() == 0, process.errors()[-3000:]
    assert process.output().endswith("all ran\n")
    assert (run.output_dir / SUMMARY_FILE).exists()
    rows = (run.output_dir / METRICS_FILE).read_text().splitlines()
    assert [json.loads(row)["memory_mib"] > 1 for row in rows] == [True] * 3
    assert (tmp_path / "exported.safetensors").exists()
    assert len(list((tmp_path / "samples").iterdir())) == 1
