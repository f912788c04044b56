"""Command lines of training scripts."""

from __future__ import annotations

import pytest

from simpletuner.helpers.configuration.migration.command_line import read_command
from simpletuner.helpers.errors import ConfigError


def test_options_before_the_script_are_the_launchers() -> None:
    command = read_command(
        "accelerate launch --num_processes 2 ./sd/train.py --rank=8 --lr-scheduler cosine --flag"
    )
    assert command.script == "train"
    assert command.launcher == {"num_processes": 2}
    assert command.options == {"rank": 8, "lr_scheduler": "cosine", "flag": True}


@pytest.mark.parametrize(
    "text",
    [
        "python train.py \\\n  --rank 8 \\\n  --lr 1e-4",
        "python train.py ^\n  --rank 8 ^\n  --lr 1e-4",
        "python train.py `\n  --rank 8 `\n  --lr 1e-4",
        "# a comment\npython train.py --rank 8 --lr 1e-4 && echo done",
    ],
    ids=["shell", "batch", "powershell", "comment and end"],
)
def test_lines_of_every_shell_are_joined(text: str) -> None:
    assert read_command(text).options == {"rank": 8, "lr": 1e-4}


def test_several_values_are_a_list() -> None:
    options = read_command('train.py --network_args "algo=lokr" "factor=4" --seed 1').options
    assert options == {"network_args": ["algo=lokr", "factor=4"], "seed": 1}


@pytest.mark.parametrize("quote", ["", '"'], ids=["bare", "quoted"])
def test_a_windows_path_keeps_its_backslashes(quote: str) -> None:
    options = read_command(rf"train.py --dir {quote}C:\train\new{quote} --seed 1").options
    assert options == {"dir": r"C:\train\new", "seed": 1}


@pytest.mark.parametrize(
    ("line", "use"),
    [('export DIR="a/b"', "$DIR"), ("DIR=a/b", "${DIR}"), ("set DIR=a/b", "%DIR%"), ('$DIR = "a/b"', "$DIR")],
    ids=["export", "assignment", "batch", "powershell"],
)
def test_variables_that_the_text_sets_are_filled_in(line: str, use: str) -> None:
    assert read_command(f"{line}\ntrain.py --dir={use}").options == {"dir": "a/b"}


def test_a_variable_that_the_text_does_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match="MODEL_DIR") as error:
        read_command("export NAME=x\ntrain.py --model=$MODEL_DIR/$NAME --data ${DATA}")
    assert "DATA" in str(error.value)
    assert "NAME," not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["echo hello", "a.py --x 1\nb.py --x 2", 'train.py --prompt "open'],
    ids=["no script", "two scripts", "open quote"],
)
def test_a_text_without_one_whole_call_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        read_command(text)
