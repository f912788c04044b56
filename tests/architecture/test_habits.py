"""Habits that a linter does not check; each list of exceptions names its reasons and may not go stale."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from package_source import PACKAGE, Module, assert_only, functions, modules

# "module name" -> why an attribute is looked up by name there.
GUESSING: dict[str, str] = {
    "simpletuner/helpers/adapters/attachment.py delattr": "torch has no other way to take a child module out",
}

# "module attribute" -> why it is set on an object of another module. torch's own switches on tensors and
# modules, and the names that other people's code relies on, need no module.
PUBLIC_CONTRACT = {"_tlora_config", "_tlora_active", "_lycoris_wrapped_network"}
TORCH_SWITCHES = {"requires_grad", "grad", "data"}
FOREIGN_ATTRIBUTES: dict[str, str] = {
    "simpletuner/helpers/adapters/network.py bypass_mode": "LyCORIS reads it, and its files do not state it",
    "simpletuner/helpers/adapters/pipeline.py _compiled_call_impl": "torch compiles hooks with the module",
    "simpletuner/helpers/adapters/inference.py __class__": "a user's own pipeline gets the mixin in place",
}

# "module function" -> the boundary that must outlive whatever fails behind it.
BROAD_EXCEPTS: dict[str, str] = {
    "simpletuner/helpers/reporting/html_report/writer.py RunPage._guarded": "a page must never end a run",
    "simpletuner/helpers/reporting/trackers.py Trackers._each": "a tracker must never end a run",
    "simpletuner/helpers/sampling/validation_sampler.py Studio.guarded": "a validation must never end a run",
}

# Modules that may print: the command line only.
PRINTING = {"simpletuner/cli.py"}

# Untrusted bytes become objects or code there.
UNSAFE_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}

# Names of model families and of their classes.
FAMILY_NAMES = re.compile(r"sdxl|flux|stable.?diffusion.?xl", re.IGNORECASE)
# "module" -> why a family is named outside models/.
NAMES_FAMILIES: dict[str, str] = {
    "simpletuner/helpers/configuration/schema/model_sections.py": "SimpleTuner's own key names",
    "simpletuner/helpers/configuration/schema/sections.py": "SimpleTuner's own key names",
}


def test_no_attribute_is_guessed() -> None:
    found = {
        f"{module} {node.func.id}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME
    }
    assert_only(found, allowed=GUESSING)


_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


def test_no_attribute_is_set_on_a_foreign_object() -> None:
    found = {f"{module} {attribute}" for module in modules() for attribute in _foreign_attributes(module)}
    assert_only(found, allowed=FOREIGN_ATTRIBUTES)


def _foreign_attributes(module: Module) -> Iterator[str]:
    own_classes = {node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)}
    own_objects = {"self", "cls"} | own_classes | set(_objects_of(module, own_classes))
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
            continue
        is_own = isinstance(node.value, ast.Name) and node.value.id in own_objects
        if not is_own and node.attr not in PUBLIC_CONTRACT | TORCH_SWITCHES:
            yield node.attr


def _objects_of(module: Module, classes: set[str]) -> Iterator[str]:
    """Names in a module that hold an object of one of its own classes, by how they are made or annotated."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.arg) and node.annotation is not None and _mentions(node.annotation, classes):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and _mentions(node.annotation, classes):
            yield from _target_names([node.target])
        elif isinstance(node, ast.Assign) and _makes_one_of(node.value, classes | {"cls"}):
            yield from _target_names(node.targets)


def _makes_one_of(value: ast.expr, classes: set[str]) -> bool:
    return isinstance(value, ast.Call) and _mentions(value.func, classes)


def _mentions(node: ast.expr, names: set[str]) -> bool:
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(node))


def _target_names(targets: list[ast.expr]) -> list[str]:
    return [each.id for each in targets if isinstance(each, ast.Name)]


def test_only_named_boundaries_catch_everything() -> None:
    found = {
        f"{module} {name}"
        for module in modules()
        for name, function in functions(module)
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _raises_again(node)
    }
    assert_only(found, allowed=BROAD_EXCEPTS)


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether it only tidies up: what was caught goes on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or _mentions(handler.type, {"Exception", "BaseException"})


@pytest.mark.parametrize("module", modules(), ids=str)
def test_only_the_command_line_prints(module: Module) -> None:
    printing = [node.lineno for node in ast.walk(module.tree) if _calls(node, {"print"})]
    assert not printing or str(module) in PRINTING


@pytest.mark.parametrize("module", modules(), ids=str)
def test_nothing_untrusted_becomes_code(module: Module) -> None:
    imported = {
        alias.name for node in ast.walk(module.tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert not imported & UNSAFE_IMPORTS
    assert not [node.lineno for node in ast.walk(module.tree) if _calls(node, UNSAFE_CALLS)]
    loads = [
        node for node in ast.walk(module.tree) if isinstance(node, ast.Call) and _is_torch_load(node.func)
    ]
    assert not [node.lineno for node in loads if not _is_weights_only(node)], (
        "torch.load unpickles: weights_only=True"
    )


def _calls(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_torch_load(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "load"
        and _mentions(function.value, {"torch"})
    )


def _is_weights_only(call: ast.Call) -> bool:
    return any(
        each.arg == "weights_only" and isinstance(each.value, ast.Constant) and each.value.value is True
        for each in call.keywords
    )


@pytest.mark.parametrize("module", [each for each in modules() if each.path.name == "__init__.py"], ids=str)
def test_an_init_file_holds_a_docstring_only(module: Module) -> None:
    body = module.tree.body
    assert ast.get_docstring(module.tree)
    assert len(body) == 1 or module.path == PACKAGE / "__init__.py", (
        "the package's own holds the version besides"
    )


def test_families_are_named_in_models_only() -> None:
    found = {
        str(module)
        for module in modules()
        if "helpers/models/" not in str(module) and "simpletuner/demo/" not in str(module)
        if FAMILY_NAMES.search(module.path.read_text(encoding="utf-8"))
    }
    assert_only(found, allowed=NAMES_FAMILIES)
