"""The names in an output folder stand in io/run_folder.py only."""

from __future__ import annotations

import ast

from tests.architecture.package_source import HELPERS, Module, assert_only, modules

HOME = Module(HELPERS / "io" / "run_folder.py")
# "module name" -> the other file that has the same name.
OTHER_FILES: dict[str, str] = {
    "simpletuner/helpers/adapters/files/foreign/schedules.py lycoris_config.json": "of another program's run",
    "simpletuner/helpers/configuration/examples.py README.md": "of the examples",
    "simpletuner/helpers/new_run/writing.py README.md": "of a new configuration",
}


def test_no_other_module_writes_a_file_name_of_the_output_folder() -> None:
    names = _names_of_files()
    assert len(names) > 15, "the names were not found"
    found = {
        f"{module} {name}"
        for module in modules()
        if module != HOME
        for text in _texts(module)
        for name in names & set(text.split("/"))
    }
    assert_only(found, allowed=OTHER_FILES)


def _names_of_files() -> set[str]:
    """Values of the home's constants; a folder's name without dot or dash is a word elsewhere too."""
    values = {
        node.value.value
        for node in HOME.tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    return {value for value in values if "." in value or value.endswith("-")}


def _texts(module: Module) -> list[str]:
    """Every text of a module, the fixed parts of f-strings included, without docstrings."""
    docstrings = {
        id(node.value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
