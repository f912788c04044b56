"""One process of a training run: `python -m simpletuner.train`, also below `accelerate launch -m`.

Torch is imported only after the configuration is found to be right.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from simpletuner.helpers.checkpointing.preemption import EXIT_PREEMPTED
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import ConfigError, SimpleTunerError
from simpletuner.helpers.io.atomic import JsonValue, write_json
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.logs import configure_logging
from simpletuner.helpers.io.run_folder import EXIT_FILE
from simpletuner.helpers.models import registry

DEFAULT_CONFIG = Path("config/config.json")
EXIT_FAILED = 1
OUTCOMES = {
    0: "done",
    EXIT_FAILED: "failed",
    2: "bad configuration",
    3: "nothing to resume",
    EXIT_PREEMPTED: "stopped by a signal, the same command goes on",
}
LAUNCH_DIR = "SIMPLETUNER_LAUNCH_DIR"
"""Names the folder in which train.sh finds its workers' process ids and reads the exit code of the first."""
SIGNALLED = "signalled"
"""The file in that folder by which train.sh notes that it was asked to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the configuration file and `key=value` arguments say; argv is sys.argv without the program.

    Returns:
        The exit code: 0 done, 1 failure, 2 bad configuration, 3 nothing to resume, 75 stopped and resumable.
    """
    code = EXIT_FAILED
    output_dir: Path | None = None
    try:
        _register_with_launcher()
        with _signals_before_training():
            config_path, overrides = split_arguments(sys.argv[1:] if argv is None else argv)
            configure_logging(main_process=is_main_process())
            config = load_config(config_path, overrides=overrides, families=registry.specs())
            output_dir = config.checkpoint.output_dir
            # Torch and the model libraries take seconds to import: a bad configuration is told before that.
            from simpletuner.helpers.training.runs import train

            code = train(config)
    except SimpleTunerError as error:
        code = error.exit_code
        if is_main_process() or not isinstance(error, ConfigError):
            _say(str(error))
    except KeyboardInterrupt:
        code = EXIT_PREEMPTED
        _say("Stopped by a signal before training began. The same command starts again.")
    finally:
        code = _failed_elsewhere(code)
        _leave_exit_code(code, output_dir=output_dir)
    return code


def split_arguments(arguments: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The configuration file that `--config` names, and every other argument as an override.

    Raises:
        ConfigError: `--config` names no file.
    """
    config = DEFAULT_CONFIG
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, value = argument.partition("=")
        if name != "--config":
            overrides.append(argument)
            continue
        value = value if has_value else next(rest, "")
        if not value:
            raise ConfigError("--config needs a file, for instance --config config/config.json.")
        config = Path(value)
    return config, tuple(overrides)


def is_main_process() -> bool:
    """Whether this process is the first of its run; the launcher numbers them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _signals_before_training() -> Iterator[None]:
    """A request to stop ends the process at once until the trainer, which saves first, watches for it."""
    # Below a launcher the other processes may wait for this one inside torch, where no Python handler runs.
    handler = signal.SIG_DFL if LAUNCH_DIR in os.environ else _interrupt
    requests = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in requests}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _register_with_launcher() -> None:
    folder = os.environ.get(LAUNCH_DIR)
    if folder is None:
        return
    (Path(folder) / f"{os.getpid()}.pid").touch()
    # A signal that came before this process could be found by its id was noted in the folder first.
    if (Path(folder) / SIGNALLED).exists():
        raise KeyboardInterrupt


def _failed_elsewhere(code: int) -> int:
    """The code, but 1 for a stop train.sh did not ask for: the launcher ends all when one process fails."""
    folder = os.environ.get(LAUNCH_DIR)
    if code != EXIT_PREEMPTED or folder is None or (Path(folder) / SIGNALLED).exists():
        return code
    _say("Stopped by the launcher because another process of this run failed.")
    return EXIT_FAILED


def _leave_exit_code(code: int, *, output_dir: Path | None) -> None:
    """Write the code where train.sh reads it and, in the main process, into the output folder."""
    folder = os.environ.get(LAUNCH_DIR)
    if folder is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        with suppress(OSError):  # train.sh was killed and its folder is gone: nobody reads the code
            (Path(folder) / "exit_code").write_text(f"{code}\n")
    if output_dir is None or not is_main_process():
        return
    record: dict[str, JsonValue] = {
        "exit_code": code,
        "outcome": OUTCOMES.get(code, "failed"),
        "pid": os.getpid(),
    }
    try:
        with run_lock(output_dir):  # while another run holds the folder, the file is that run's
            write_json(output_dir / EXIT_FILE, record)
    except SimpleTunerError as error:
        _say(f"{EXIT_FILE} was not written. {error}")


def _say(message: str) -> None:
    process = "" if is_main_process() else f" (process {os.environ['RANK']})"
    sys.stderr.write(f"simpletuner{process}: {message}\n")


def _process_status(code: int) -> int:
    """What the process itself ends with: a launcher that sees a code other than 0 kills the other processes.

    They may still be writing the checkpoint that an agreed stop leaves, so for train.sh, which reads the real
    code from its folder, that stop is no failure.
    """
    return 0 if code == EXIT_PREEMPTED and LAUNCH_DIR in os.environ else code


if __name__ == "__main__":
    sys.exit(_process_status(main()))
