"""The package's source as the structure tests see it: modules, their syntax trees, who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "simpletuner"
HELPERS = PACKAGE / "helpers"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(REPOSITORY).as_posix()

    @property
    def dotted(self) -> str:
        parts = self.path.relative_to(REPOSITORY).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def folder(self) -> str:
        """The unit that layers are made of: a folder of helpers, a module directly in it, or 'entry'."""
        if not self.path.is_relative_to(HELPERS):
            return "package" if self.path == PACKAGE / "__init__.py" else "entry"
        return self.path.relative_to(HELPERS).with_suffix("").parts[0]

    @property
    def tree(self) -> ast.Module:
        return _parse(self.path)


@dataclass(frozen=True)
class Import:
    """One imported module, and whether only the type checker sees it."""

    target: str
    line: int
    for_types: bool


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package, in the order of their paths."""
    return tuple(Module(path) for path in sorted(PACKAGE.rglob("*.py")))


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name."""
    yield from _functions(module.tree, "")


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _functions(child, f"{prefix}{child.name}." if named else prefix)


def imports(module: Module) -> Iterator[Import]:
    """Every import of a module, wherever it stands, as the dotted name of the module that is imported."""
    for_types = {
        id(node)
        for block in ast.walk(module.tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in for_types)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                known = is_module(target)
                yield Import(target if known else node.module, node.lineno, id(node) in for_types)


@cache
def graph() -> dict[str, set[str]]:
    """Dotted name of each module -> modules of the package that it imports, for types or late included."""
    names = {module.dotted for module in modules()}
    return {module.dotted: {each.target for each in imports(module)} & names for module in modules()}


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a module or folder of the package."""
    path = REPOSITORY.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def folder_of(dotted: str) -> str:
    """The layer unit of a dotted name inside the package."""
    parts = dotted.split(".")
    if parts[:2] == ["simpletuner", "helpers"] and len(parts) > 2:
        return parts[2]
    return "package" if parts == ["simpletuner"] else "entry"


def assert_only(found: Collection[str], *, allowed: Collection[str]) -> None:
    """Nothing but the exceptions that are allowed, each of which must still be there."""
    assert not set(found) - set(allowed), f"against the rule: {sorted(set(found) - set(allowed))}"
    assert not set(allowed) - set(found), f"no longer needed in the list: {sorted(set(allowed) - set(found))}"
