"""Each row of documentation/reliability.md has a test that runs by default."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)
MARKER = "reliability_row"
# A test that names one of these may not run.
NOT_BY_DEFAULT = {"skip", "skipif", "xfail", "importorskip", "gpu", "remote", "slow"}


def test_every_row_has_a_test_that_runs_by_default(repository: Path) -> None:
    rows = [int(row) for row in ROW.findall((repository / "documentation" / "reliability.md").read_text())]
    assert rows == list(range(1, 33))
    held, by_default = set(), set()
    for file in sorted((repository / "tests").rglob("test_*.py")):
        for nodes in _tests(file):
            held |= _rows(nodes)
            by_default |= set() if _names(nodes) & NOT_BY_DEFAULT else _rows(nodes)
    assert held <= set(rows), f"not in the table: {sorted(held - set(rows))}"
    assert by_default == set(rows), f"without a test that runs: {sorted(set(rows) - by_default)}"


def _tests(file: Path) -> Iterator[Sequence[ast.AST]]:
    """Each test of a file with its decorators, and with the marks of the whole file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    marks = [node for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in _names([node])]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield [node, *marks]


def _rows(nodes: Sequence[ast.AST]) -> set[int]:
    return {
        ast.literal_eval(node.args[0])
        for node in _walk(nodes)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == MARKER
    }


def _names(nodes: Sequence[ast.AST]) -> set[str]:
    names = {node.id for node in _walk(nodes) if isinstance(node, ast.Name)}
    return names | {node.attr for node in _walk(nodes) if isinstance(node, ast.Attribute)}


def _walk(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from ast.walk(node)
