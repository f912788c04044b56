"""One process of a training run: `python -m simpletuner.train`, alone or under `accelerate launch -m`.

It imports little before its signal handlers are set, and torch only after the configuration is valid.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from simpletuner.helpers.checkpointing.preemption import (
    EXIT_PREEMPTED,
    STOP_WANTED,
    launch_folder,
    stop_signals,
)
from simpletuner.helpers.configuration.finding import choose_config
from simpletuner.helpers.errors import ConfigError, SimpleTunerError
from simpletuner.helpers.io.atomic import JsonValue, write_json
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.io.logs import configure_logging, leave_closed_terminal
from simpletuner.helpers.io.run_folder import EXIT_FILE

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import ModelSpec

EXIT_FAILED = 1
EXIT_WAIT_S = 10.0
"""What exit handlers of libraries may take."""
OUTCOMES = {
    0: "done",
    EXIT_FAILED: "failed",
    2: "bad configuration",
    3: "nothing to resume",
    EXIT_PREEMPTED: "stopped, the same command goes on",
}
EXIT_CODE = "exit_code"
"""File in the launch folder: the exit code that train.sh returns."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the configuration file and the `key=value` overrides; argv is sys.argv without the program.

    Returns:
        The exit code: 0 done, 1 failure, 2 bad configuration, 3 nothing to resume, 75 stopped and resumable.
    """
    code, message = EXIT_FAILED, ""
    output_dir: Path | None = None
    try:
        with _signals_before_training():
            _register_with_launcher()
            from simpletuner.helpers.configuration.load import load_config
            from simpletuner.helpers.models import registry

            configure_logging(main_process=is_main_process())
            given, arguments = split_arguments(sys.argv[1:] if argv is None else argv)
            config_path, overrides = choose_config(given, arguments)
            config = load_config(config_path, overrides=overrides, families=registry.specs())
            output_dir = config.checkpoint.output_dir
            code = _train(config, registry.specs())
    except SimpleTunerError as error:
        code = error.exit_code
        if is_main_process() or not isinstance(error, ConfigError):
            message = str(error)
    except KeyboardInterrupt:
        code = EXIT_PREEMPTED
    finally:
        leave_closed_terminal()
        code = _failed_elsewhere(code)
        _write_exit_code(code, output_dir=output_dir)
        _say_last(message, code=code)
        atexit.register(_end_soon, _process_status(code))
    return code


def _train(config: RunConfig, families: Mapping[str, ModelSpec]) -> int:
    """Train, unless the run is finished."""
    # Torch and the model libraries take seconds to import; an error or a finished run must not wait.
    from simpletuner.helpers.training.finished import find_finished

    finished = find_finished(config, families)
    if finished is not None:
        return finished.run()
    from simpletuner.helpers.training.runs import train

    return train(config)


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """The configuration after `--config`, if there is one, and all other arguments.

    Raises:
        ConfigError: `--config` names no file.
    """
    config: Path | None = None
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
            continue
        value = value if has_value else next(rest, "")
        if not value:
            raise ConfigError("--config needs a file, for instance --config config/config.json.")
        config = Path(value)
    return config, tuple(others)


def is_main_process() -> bool:
    """Whether this process has rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _signals_before_training() -> Iterator[None]:
    """Until the trainer installs handlers that save first, a stop signal ends the process at once."""
    # Under a launcher a process may wait for another one inside torch, where no Python handler runs.
    handler = signal.SIG_DFL if launch_folder() is not None else _interrupt
    previous = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _register_with_launcher() -> None:
    folder = launch_folder()
    if folder is None:
        return
    (folder / f"{os.getpid()}.pid").touch()
    # train.sh recorded a signal that came before it knew this process id.
    if (folder / STOP_WANTED).exists():
        raise KeyboardInterrupt


def _failed_elsewhere(code: int) -> int:
    """The code; where nobody wanted the launch to stop that of the process that failed, else 1."""
    folder = launch_folder()
    if code != EXIT_PREEMPTED or folder is None or (folder / STOP_WANTED).exists():
        return code
    _say("Stopped by the launcher because another process of this run failed.")
    try:
        return int((folder / EXIT_CODE).read_bytes())
    except (OSError, ValueError):
        return EXIT_FAILED


def _write_exit_code(code: int, *, output_dir: Path | None) -> None:
    """Write the code into the launch folder and, in the main process, into the output folder."""
    folder = launch_folder()
    if folder is not None:
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        # The launcher kills the first process when another one fails, maybe before the first can write.
        if is_first or code not in (0, EXIT_PREEMPTED):
            with suppress(OSError), (folder / EXIT_CODE).open("wb" if is_first else "xb") as file:
                file.write(f"{code}\n".encode())  # the launch folder is gone when train.sh was killed
    if output_dir is None or not is_main_process():
        return
    record: dict[str, JsonValue] = {
        "exit_code": code,
        "outcome": OUTCOMES.get(code, "failed"),
        "pid": os.getpid(),
    }
    try:
        with run_lock(output_dir):  # the file belongs to the run that holds the lock
            write_json(output_dir / EXIT_FILE, record)
    except SimpleTunerError as error:
        _say(f"{EXIT_FILE} was not written. {error}")


def _say_last(message: str, *, code: int) -> None:
    """The last line of the run: its error, or what to do after a stop."""
    if message:
        _say(message)
    elif code == EXIT_PREEMPTED and is_main_process():
        _say("Stopped. The same command goes on.")


def _say(message: str) -> None:
    process = "" if is_main_process() else f" (process {os.environ['RANK']})"
    sys.stderr.write(f"simpletuner{process}: {message}\n")


def _end_soon(status: int) -> None:
    """End the process after EXIT_WAIT_S at the latest; exit handlers run while the timer does.

    The handler of wandb waits for its uploads, and so for as long as its server does not answer.
    """
    timer = Timer(EXIT_WAIT_S, os._exit, [status])
    timer.daemon = True
    timer.start()


def _process_status(code: int) -> int:
    """Exit status of the process; a launcher kills the other processes after any status but 0.

    Other ranks may still be writing the checkpoint, so return 0 under a launcher; train.sh reads the real
    code from the launch folder.
    """
    return 0 if code == EXIT_PREEMPTED and launch_folder() is not None else code


if __name__ == "__main__":
    sys.exit(_process_status(main()))
