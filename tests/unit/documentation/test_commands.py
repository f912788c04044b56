"""Every command block of every page is right: it runs here, or says why it does not, and each line parses.

`<!-- tested: configured -->` or `<!-- tested: trained -->` before a block has its lines run in
tests/integration/test_documented_commands.py; `<!-- not run: the reason -->` has them parsed only.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.core

from simpletuner import cli
from tests.pages import REPOSITORY, Block, blocks, pages

SHELLS = {"bash", "powershell"}
TESTS = {"tested: configured", "tested: trained"}
PROGRAMS = {"cp", "hf", "pip", "py"}
"""Of other projects; a line that begins with another word is one of this repository's commands."""
BLOCKS = [block for page in pages() for block in blocks(page) if block.language in SHELLS]


def lines(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    text = block.text.replace("\\\n", " ") if block.language == "bash" else block.text.replace("\\", "/")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_in_a_test_or_says_why_not(block: Block) -> None:
    assert block.note in TESTS or re.fullmatch(r"not run: \w.{9,}", block.note), block.note


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_line_of_a_block_is_a_command_with_its_options(block: Block) -> None:
    assert lines(block)
    for words in lines(block):
        check(words)


def check(words: list[str]) -> None:
    """Fail unless a command exists and takes these words."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in {"python", "accelerate"} and "-m" in arguments[:2]:
        module, *arguments = arguments[arguments.index("-m") + 1 :]
        if module == "simpletuner":
            parse(arguments)
        elif module.startswith("simpletuner."):
            in_source(REPOSITORY.joinpath(*module.split(".")).with_suffix(".py"), arguments)
    elif program == "simpletuner":
        parse(arguments)
    elif program == "python" and arguments[0] != "-c":
        in_source(REPOSITORY / arguments[0], arguments[1:])
    elif program not in PROGRAMS | {"python"} and not program.startswith(".venv/"):
        assert (REPOSITORY / program).is_file(), program


def parse(arguments: list[str]) -> None:
    """Fail unless a command of `simpletuner` takes these arguments; nothing is run."""
    command: Any = typer.main.get_command(cli.app)
    while isinstance(command, typer.core.TyperGroup):
        name, *arguments = arguments
        assert name in command.commands, name
        command = command.commands[name]
    command.make_context("simpletuner", arguments)


def in_source(file: Path, arguments: list[str]) -> None:
    """Fail unless a script exists and has each option."""
    source = file.read_text(encoding="utf-8")
    for option in (each.partition("=")[0] for each in arguments if each.startswith("--")):
        assert f'"{option}"' in source, f"{file.name} {option}"


@pytest.mark.parametrize(
    "line",
    [
        "simpletuner samples mine --prompt x",
        "simpletuner sample mine --promt x",
        "simpletuner ask mine",
        "simpletuner export a.safetensors --output b --format comfy",
        "simpletuner cache stat cache",
        "python tests/benchmarks/gpu_suite.py --minute 8",
        "./trian.sh mine",
    ],
)
def test_a_mistake_in_a_line_is_found(line: str) -> None:
    with pytest.raises((typer.TyperException, AssertionError)):
        check(shlex.split(line))
