"""Modules and functions stay small enough to be read; ruff holds the complexity."""

from __future__ import annotations

import ast

from tests.architecture.package_source import Function, Module, assert_only, functions, modules

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_PARAMETERS = 8
MAX_NESTING = 3
# weighted_mse(prediction, target, weight) reads well; with a fourth nobody knows which is which.
MAX_POSITIONAL = 3

# "module function" -> why the rule would make this code worse. An entry that is no longer needed fails.
MORE_PARAMETERS: dict[str, str] = {
    "simpletuner/helpers/adapters/tlora/layer.py TLoraLayer.__init__": "LyCORIS calls it so, and by position",
    "simpletuner/cli_sample.py sample_command": "each is an option of the command line",
    "simpletuner/cli_compare.py compare_command": "each is an option of the command line",
    "simpletuner/cli.py export_command": "each is an option of the command line",
    "simpletuner/cli_init.py init": "each is an option of the command line",
    "simpletuner/cli_files.py merge": "each is an option of the command line",
    "simpletuner/cli_files.py resize": "each is an option of the command line",
    "simpletuner/cli_files.py extract": "each is an option of the command line",
}
_PUBLIC = "people's code calls it by position"
MORE_POSITIONAL = {
    "simpletuner/helpers/training/lycoris.py apply_tlora_timestep_mask": _PUBLIC,
    "simpletuner/helpers/training/lycoris.py apply_tlora_inference_mask": _PUBLIC,
    "simpletuner/helpers/adapters/attachment.py _hide_keys": "a torch hook, called by position",
    "simpletuner/helpers/adapters/tlora/masked_layer.py MaskedLayer._after_base": "a torch hook, by position",
}
POSITIONAL_FLAGS: dict[str, str] = {
    "simpletuner/cli.py _print_version": "typer calls it so",
    "simpletuner/helpers/adapters/tlora/masked_layer.py MaskedLayer._apply": "torch's signature",
}

_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


def test_a_module_has_at_most_600_lines() -> None:
    lines = {str(each): len(each.path.read_text(encoding="utf-8").splitlines()) for each in modules()}
    assert not {module: count for module, count in lines.items() if count > MAX_MODULE_LINES}


def test_a_function_has_at_most_100_lines() -> None:
    lines = {f"{module} {name}": _num_lines(each) for module, name, each in _all()}
    assert not {function: count for function, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_a_function_nests_at_most_3_blocks() -> None:
    nesting = {f"{module} {name}": _nesting(each) for module, name, each in _all()}
    assert not {function: depth for function, depth in nesting.items() if depth > MAX_NESTING}


def test_a_function_has_at_most_8_parameters() -> None:
    many = {f"{module} {name}" for module, name, each in _all() if _num_parameters(each) > MAX_PARAMETERS}
    assert_only(many, allowed=MORE_PARAMETERS)


def test_parameters_after_the_third_are_keyword_only() -> None:
    positional = {
        f"{module} {name}" for module, name, each in _all() if _num_positional(name, each) > MAX_POSITIONAL
    }
    assert_only(positional, allowed=MORE_POSITIONAL)


def test_a_flag_is_keyword_only() -> None:
    flags = {f"{module} {name}" for module, name, each in _all() if _has_positional_flag(each)}
    assert_only(flags, allowed=POSITIONAL_FLAGS)


def _has_positional_flag(function: Function) -> bool:
    positional = function.args.posonlyargs + function.args.args
    return any(isinstance(each.annotation, ast.Name) and each.annotation.id == "bool" for each in positional)


def _all() -> list[tuple[Module, str, Function]]:
    return [(module, name, each) for module in modules() for name, each in functions(module)]


def _num_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def _names(parameters: list[ast.arg]) -> list[str]:
    return [each.arg for each in parameters if each.arg not in ("self", "cls")]


def _num_parameters(function: Function) -> int:
    arguments = function.args
    variadic = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len(_names(arguments.posonlyargs + arguments.args)) + len(arguments.kwonlyargs) + len(variadic)


def _num_positional(name: str, function: Function) -> int:
    if name.rpartition(".")[2].startswith("__"):  # Python itself calls it, by position
        return 0
    return len(_names(function.args.posonlyargs + function.args.args))


def _nesting(node: ast.AST, *, depth: int = 0) -> int:
    """Blocks inside blocks; an elif is no deeper than its if, a nested function starts anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deeper = isinstance(child, _BLOCKS) and not (is_elif and len(node.orelse) == 1)
        deepest = max(deepest, _nesting(child, depth=depth + deeper))
    return deepest
