"""The launch: what train.sh installs, reads, starts, hands on and returns.

The trainer is replaced by one that waits, fails or ends as an environment variable says; all the rest
(environment, configuration, accelerate's launcher, signals, exit codes) is the real thing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from simpletuner import train
from simpletuner.helpers.checkpointing.preemption import LAUNCH_DIR

PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
    [ "$3" = --version ] || echo "$@" >>"{calls}"
    exit 0
fi
exec "{python}" "$@"
"""

TRAINER = '''"""A trainer that does what TEST_TRAINER says."""

import os
import time
from pathlib import Path

from simpletuner.helpers.errors import NothingToResumeError, TrainingError
from simpletuner.helpers.checkpointing.preemption import Preemption

RANK = os.environ.get("RANK", "0")


class Trainer:
    def __init__(self, config):
        self.config = config

    def run(self):
        notes = Path(os.environ["TEST_NOTES"])
        names = [name for name in os.environ if name.startswith(("ACCELERATE_", "OMP_", "GOMP_", "WORLD_"))]
        facts = [f"{name}={os.environ[name]}" for name in sorted(names)]
        facts.append(f"pid={os.getpid()}")
        facts.append(f"seed={self.config.training.seed}")
        facts.append(f"mixed_precision={self.config.precision.mixed_precision}")
        facts.append(f"dynamo_backend={self.config.compiling.dynamo_backend}")
        action, _, rank = os.environ["TEST_TRAINER"].partition(":")
        with Preemption() as preemption:
            (notes / f"started-{RANK}").write_text("\\n".join(facts))
            if action == "fail" and rank in ("", RANK):
                raise TrainingError("the loss is not finite")
            if action == "resume":
                raise NothingToResumeError("no checkpoint of that name")
            while action in ("wait", "fail") and not preemption.requested:
                time.sleep(0.02)
            if preemption.requested:
                # The main process writes the checkpoint; the others end long after the signal and before it.
                time.sleep(1.8 if RANK == "0" else 0.8)
                (notes / f"saved-{RANK}").touch()
        return 75 if preemption.requested else 0


def train(config):
    return Trainer(config).run()
'''


@dataclass
class Checkout:
    """A copy of the repository with an environment of its own that notes every installation."""

    root: Path
    environment: Path
    notes: Path
    temporary: Path

    def start(
        self, *arguments: str, trainer: str = "end", first: tuple[str, ...] = (), **variables: str
    ) -> subprocess.Popen[str]:
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(
                ("ACCELERATE_", "TRAINING_", "CONFIG_", "OMP_", "GOMP_", "VIRTUAL_ENV", "CONDA_")
            )
        }
        own = {
            "VENV_PATH": str(self.environment),
            "PYTHONPATH": str(self.root),
            "TMPDIR": str(self.temporary),
            "TEST_NOTES": str(self.notes),
            "TEST_TRAINER": trainer,
        }
        return subprocess.Popen(
            ["bash", str(self.root / "train.sh"), *first, f"output_dir={self.output_dir}", *arguments],
            cwd=self.notes, env=clean | own | variables, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(
        self, *arguments: str, trainer: str = "end", first: tuple[str, ...] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, trainer=trainer, first=first, **variables)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def output_dir(self) -> Path:
        return self.root / "output" / "test"

    def installations(self) -> list[str]:
        calls = self.notes / "pip.txt"
        return calls.read_text().splitlines() if calls.exists() else []

    def facts(self, rank: int = 0) -> dict[str, str]:
        lines = (self.notes / f"started-{rank}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def started(self, rank: int = 0) -> bool:
        note = self.notes / f"started-{rank}"
        return note.exists() and note.read_text() != ""

    def saved(self, rank: int = 0) -> bool:
        return (self.notes / f"saved-{rank}").exists()

    def recorded_code(self) -> int:
        code = json.loads((self.output_dir / "exit.json").read_text())["exit_code"]
        assert isinstance(code, int)
        return code


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Checkout:
    root = tmp_path / "a clone"
    for name in ("simpletuner", "config", "tools"):
        shutil.copytree(
            repository / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "config.env")
        )
    for name in ("train.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, root / name)
    (root / "simpletuner/helpers/training/runs.py").write_text(TRAINER)
    environment, notes, temporary = tmp_path / "environment", tmp_path / "notes", tmp_path / "temporary"
    (environment / "bin").mkdir(parents=True)
    notes.mkdir()
    temporary.mkdir()
    python = environment / "bin" / "python"
    python.write_text(PYTHON.format(calls=notes / "pip.txt", python=sys.executable))
    python.chmod(0o755)
    return Checkout(root, environment, notes, temporary)


def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # pytest's own limit ends a wait in vain
        time.sleep(0.02)


def test_train_sh_installs_once_and_again_when_the_packages_change(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    assert checkout.run().returncode == 0
    assert checkout.installations() == [
        "-m pip install --quiet --no-input --disable-pip-version-check -e . -c constraints.txt"
    ]
    with (checkout.root / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert checkout.run().returncode == 0
    assert len(checkout.installations()) == 2


def test_train_sh_hands_arguments_and_variables_to_the_run(checkout: Checkout) -> None:
    result = checkout.run("seed=7", MIXED_PRECISION="no", TRAINING_DYNAMO_BACKEND="AOT_EAGER")
    assert result.returncode == 0, result.stderr
    facts = checkout.facts()
    assert (facts["seed"], facts["mixed_precision"]) == ("7", "no")
    assert facts["ACCELERATE_MIXED_PRECISION"] == "no"
    assert facts["dynamo_backend"] == "aot_eager"
    assert facts["GOMP_SPINCOUNT"] == "0"
    assert "OMP_NUM_THREADS" not in facts, "one process may use every core"
    assert checkout.recorded_code() == 0


def test_an_argument_wins_over_a_variable(checkout: Checkout) -> None:
    assert checkout.run("mixed_precision=no", MIXED_PRECISION="bf16").returncode == 0
    assert checkout.facts()["mixed_precision"] == "no"


def test_train_sh_leaves_the_users_thread_settings(checkout: Checkout) -> None:
    assert checkout.run(OMP_NUM_THREADS="3", OMP_WAIT_POLICY="active").returncode == 0
    facts = checkout.facts()
    assert facts["OMP_NUM_THREADS"] == "3"
    assert "GOMP_SPINCOUNT" not in facts


def test_env_names_a_folder_and_its_settings_win_over_the_general_ones(checkout: Checkout) -> None:
    shutil.copytree(checkout.root / "config", checkout.root / "config/mine")
    _set_in_config(checkout.root / "config/mine/config.json", seed=11)
    (checkout.root / "config/config.env").write_text("ENV=mine\nMIXED_PRECISION=bf16\n")
    (checkout.root / "config/mine/config.env").write_text("export MIXED_PRECISION='no'\n")
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    facts = checkout.facts()
    assert (facts["seed"], facts["mixed_precision"]) == ("11", "no")


def test_a_first_argument_names_the_configuration(checkout: Checkout) -> None:
    shutil.copytree(checkout.root / "config", checkout.root / "config/mine")
    _set_in_config(checkout.root / "config/mine/config.json", seed=11)
    (checkout.root / "config/mine/config.env").write_text("MIXED_PRECISION=no\n")
    for name, seed in (("mine", "11"), ("config/mine/config.json", "11"), ("config", "42")):
        result = checkout.run(first=(name,))
        assert result.returncode == 0, result.stderr
        assert checkout.facts()["seed"] == seed
    assert checkout.run(first=("mien",)).returncode == 2


def test_the_callers_environment_wins_over_the_settings_files(checkout: Checkout) -> None:
    (checkout.root / "config/config.env").write_text("CONFIG_PATH=nowhere.json\nMIXED_PRECISION=fp16\n")
    result = checkout.run(CONFIG_PATH="config/config", MIXED_PRECISION="no")
    assert result.returncode == 0, result.stderr
    assert checkout.facts()["mixed_precision"] == "no"


def _session_of(leader: int) -> list[int]:
    """Processes that still run in the session which one process began."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(entry.name)) == leader:
                members.append(int(entry.name))
    return members


def _set_in_config(path: Path, **values: object) -> None:
    settings = {key.lstrip("-"): value for key, value in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(settings | values))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ENV": "absent"}, "no folder config/absent"),
        ({"CONFIG_BACKEND": "toml"}, "CONFIG_BACKEND=toml"),
        ({"TRAINING_NUM_PROCESSES": "two"}, "TRAINING_NUM_PROCESSES=two"),
        ({"TRAINING_NUM_PROCESSES": "0"}, "TRAINING_NUM_PROCESSES=0"),
        ({"TRAINING_NUM_PROCESSES": "3", "TRAINING_NUM_MACHINES": "2"}, "multiple of TRAINING_NUM_MACHINES"),
        ({"ACCELERATE_CONFIG_PATH": "absent.yaml"}, "absent.yaml is not a file"),
        ({"CONFIG_PATH": "config/absent.json"}, "absent.json"),
    ],
)
def test_a_setting_that_cannot_be_used_ends_with_code_2(
    checkout: Checkout, variables: dict[str, str], message: str
) -> None:
    result = checkout.run(**variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert not checkout.started()


def test_a_bad_configuration_ends_with_code_2_before_the_trainer_starts(checkout: Checkout) -> None:
    result = checkout.run("lerning_rate=1e-4")
    assert result.returncode == 2
    assert "learning_rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert not checkout.started()


@pytest.mark.parametrize(("trainer", "code"), [("fail", 1), ("resume", 3)])
def test_one_process_returns_the_trainers_code(checkout: Checkout, trainer: str, code: int) -> None:
    result = checkout.run(trainer=trainer)
    assert result.returncode == code
    assert checkout.recorded_code() == code
    assert result.stderr.count("simpletuner: ") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda each: each.name
)
def test_a_signal_to_one_process_ends_with_code_75(checkout: Checkout, number: signal.Signals) -> None:
    process = checkout.start(trainer="wait")
    _wait_until(checkout.started)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 75
    assert "same command goes on" in err.splitlines()[-1]
    assert checkout.saved()
    assert checkout.recorded_code() == 75


def test_nohup_lets_a_run_outlive_its_terminal(checkout: Checkout) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = checkout.start(trainer="wait")
    finally:
        signal.signal(signal.SIGHUP, before)
    _wait_until(checkout.started)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    process.communicate()
    assert process.returncode == 75


def test_two_processes_without_a_gpu_are_one_run_of_two(checkout: Checkout) -> None:
    result = checkout.run(TRAINING_NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    facts = checkout.facts(1)
    assert facts["WORLD_SIZE"] == "2"
    assert facts["ACCELERATE_USE_CPU"] == "true", "else each process would believe to be alone"
    assert int(facts["OMP_NUM_THREADS"]) >= 1
    assert checkout.recorded_code() == 0


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda each: each.name
)
def test_a_signal_to_two_processes_lets_both_save_and_ends_with_code_75(
    checkout: Checkout, number: signal.Signals
) -> None:
    process = checkout.start(trainer="wait", TRAINING_NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    _wait_until(lambda: checkout.started(0) and checkout.started(1))
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert checkout.saved(0)
    assert checkout.saved(1)
    assert checkout.recorded_code() == 75


def test_a_signal_before_the_processes_start_ends_with_code_75_and_leaves_none_behind(
    checkout: Checkout,
) -> None:
    process = checkout.start(trainer="wait", TRAINING_NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    _wait_until(lambda: any(checkout.temporary.glob("simpletuner.*")))
    time.sleep(0.2)
    process.terminate()
    process.communicate()
    assert process.returncode == 75
    assert not checkout.saved()
    _wait_until(lambda: not _session_of(process.pid))
    assert not list(checkout.temporary.glob("simpletuner.*"))


@pytest.mark.reliability_row(31)
def test_a_killed_process_of_two_ends_the_run_with_code_1_and_leaves_none_behind(checkout: Checkout) -> None:
    process = checkout.start(trainer="wait", TRAINING_NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    _wait_until(lambda: checkout.started(0) and checkout.started(1))
    os.kill(int(checkout.facts(1)["pid"]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert not _session_of(process.pid)
    assert checkout.recorded_code() == 1


@pytest.mark.parametrize(("trainer", "code"), [("fail:1", 1), ("fail:0", 1), ("resume", 3)])
def test_two_processes_return_the_code_of_the_one_that_failed(
    checkout: Checkout, trainer: str, code: int
) -> None:
    result = checkout.run(trainer=trainer, TRAINING_NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == code, result.stderr
    # The launcher ends the first process when another fails; before training begins it leaves no record.
    if trainer == "fail:0" or (checkout.output_dir / "exit.json").exists():
        assert checkout.recorded_code() == code


def test_the_code_of_a_failed_process_counts_until_the_first_one_writes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_DIR, str(tmp_path))

    def leaves(rank: str, code: int) -> str:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        train._write_exit_code(train._failed_elsewhere(code), output_dir=None)
        return (tmp_path / "exit_code").read_text()

    assert leaves("1", 3) == "3\n"
    assert leaves("2", 1) == "3\n", "the first that failed counts"
    assert leaves("0", 75) == "3\n", "the launcher stopped it"
    assert leaves("0", 2) == "2\n"
    (tmp_path / "exit_code").unlink()
    assert leaves("0", 75) == "1\n", "the other process was killed"
