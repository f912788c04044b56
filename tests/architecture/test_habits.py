"""Habits that a linter does not check; each list of exceptions names its reasons and may not go stale."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.package_source import Module, assert_only, functions, modules

# "module name" -> why an attribute is guessed, set or deleted by its name there.
BY_NAME: dict[str, str] = {
    "simpletuner/helpers/adapters/attachment.py delattr": "torch has no other way to take a child module out",
}

# "module attribute" -> why it is set on an object of another module. torch's own switches on tensors and
# modules, and the names that other people's code relies on, need no module.
PUBLIC_CONTRACT = {"_tlora_config", "_tlora_active", "_lycoris_wrapped_network"}
TORCH_SWITCHES = {"requires_grad", "grad", "data"}
FOREIGN_ATTRIBUTES: dict[str, str] = {
    "simpletuner/helpers/io/redaction.py stdout": "all that writes to the terminal looks it up there",
    "simpletuner/helpers/io/redaction.py stderr": "the same",
    "simpletuner/train.py daemon": "threading.Timer takes it as an attribute only",
    "simpletuner/helpers/adapters/network.py forward": "LyCORIS puts it in place of the layer's",
    "simpletuner/helpers/adapters/new_tokens.py eos_token_id": "transformers pools there, and reads it once",
    "simpletuner/helpers/adapters/peft_lora.py _disable_adapters": "PEFT's own switch freezes factors too",
    "simpletuner/helpers/adapters/tlora/branch.py branch": "autograd's context holds what is no tensor",
    "simpletuner/helpers/adapters/tlora/forming.py kept": "the same",
    "simpletuner/helpers/adapters/rebuilding.py bypass_mode": "LyCORIS reads it; no tensor states it",
    "simpletuner/helpers/adapters/pipeline.py _compiled_call_impl": "torch compiles hooks with the module",
    "simpletuner/helpers/models/compiling.py _compiled_call_impl": "torch has no way back",
    "simpletuner/helpers/models/compiling.py skip_nnmodule_hook_guards": "torch documents it as a setting",
    "simpletuner/helpers/adapters/inference.py __class__": "a user's own pipeline gets the mixin in place",
    "simpletuner/helpers/training/muon.py param_groups": "the parts of one optimiser share its groups",
    "simpletuner/helpers/training/weight_optimizer.py param_groups": "one group is stepped at a time",
    "simpletuner/helpers/training/muon.py state": "the parts of one optimiser share its state",
}

# "module function", below simpletuner/helpers -> the boundary that must outlive whatever fails behind it.
BROAD_EXCEPTS: dict[str, str] = {
    "caching/prefetch.py _serve": "what a thread raises is raised again where its result is used",
    "data/sources/read_ahead.py _serve": "what a thread raises is raised again where its result is used",
    "reporting/html_report/writer.py RunPage._best_effort": "a page must never end a run",
    "reporting/tracker_thread.py TrackerThread._work": "a tracker must never end a run",
    "training/final_files.py FinalFiles._save_card": "a card must never end a run",
    "sampling/validation_sampler.py ValidationSampler.best_effort": "a validation must never end a run",
}

# Modules that may print: the command line only.
PRINTING = {
    "simpletuner/cli.py",
    "simpletuner/cli_cache.py",
    "simpletuner/cli_compare.py",
    "simpletuner/cli_data.py",
    "simpletuner/cli_estimate.py",
    "simpletuner/cli_files.py",
    "simpletuner/cli_init.py",
    "simpletuner/cli_runs.py",
    "simpletuner/cli_sample.py",
}

# Untrusted bytes become objects or code there.
UNSAFE_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}

# Names of model families and of their classes.
FAMILY_NAMES = re.compile(r"sdxl|flux|stable.?diffusion.?xl", re.IGNORECASE)
# "module" -> why a family is named outside models/.
NAMES_FAMILIES: dict[str, str] = {
    "simpletuner/helpers/configuration/schema/adapter.py": "SimpleTuner's own key names",
    "simpletuner/helpers/configuration/schema/noise.py": "SimpleTuner's own key names",
}


def test_no_attribute_is_guessed() -> None:
    found = {
        f"{module} {node.func.id}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _guesses(node.func.id, node)
    }
    assert_only(found, allowed=BY_NAME)


def _guesses(function: str, call: ast.Call) -> bool:
    """Whether a missing attribute passes unseen, or an attribute comes or goes where nobody can find it."""
    return function in {"hasattr", "setattr", "delattr"} or (function == "getattr" and len(call.args) != 2)


def test_no_attribute_is_looked_up_in_vars() -> None:
    # vars sees no property, no slot and nothing inherited: getattr(x, name) does.
    found = [
        f"{module}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _calls(node.value, {"vars"})
    ]
    assert not found


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
    makers = {
        name
        for name, function in functions(module)
        if function.returns is not None and _mentions(function.returns, classes)
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.arg) and node.annotation is not None and _mentions(node.annotation, classes):
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and _mentions(node.annotation, classes):
            yield from _target_names([node.target])
        elif isinstance(node, ast.Assign) and _makes_one_of(node.value, classes | makers | {"cls"}):
            yield from _target_names(node.targets)


def _makes_one_of(value: ast.expr, classes: set[str]) -> bool:
    return isinstance(value, ast.Call) and _mentions(value.func, classes)


def _mentions(node: ast.expr, names: set[str]) -> bool:
    return any(isinstance(each, ast.Name) and each.id in names for each in ast.walk(node))


def _target_names(targets: list[ast.expr]) -> list[str]:
    return [each.id for each in targets if isinstance(each, ast.Name)]


def test_only_named_boundaries_catch_everything() -> None:
    found = {
        f"{module} {name}".removeprefix("simpletuner/helpers/")
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


def test_only_the_command_line_prints() -> None:
    printing = {
        str(module) for module in modules() for node in ast.walk(module.tree) if _calls(node, {"print"})
    }
    assert_only(printing, allowed=PRINTING)


def test_nothing_untrusted_becomes_code() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if _calls(node, UNSAFE_CALLS) or _imports_unsafe(node) or _unpickles(node)
    ]
    assert not found, f"these run what a file says (torch.load without weights_only=True included): {found}"


def _imports_unsafe(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module in UNSAFE_IMPORTS
    return isinstance(node, ast.Import) and bool({alias.name for alias in node.names} & UNSAFE_IMPORTS)


def _unpickles(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _is_torch_load(node.func) and not _is_weights_only(node)


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


def test_an_init_file_holds_a_docstring_only() -> None:
    found = [module for module in modules() if module.path.name == "__init__.py"]
    assert not [str(module) for module in found if not ast.get_docstring(module.tree)]
    # The package's own holds the version besides.
    more = [str(module) for module in found if len(module.tree.body) > 1]
    assert more == ["simpletuner/__init__.py"]


def test_families_are_named_in_models_only() -> None:
    found = {
        str(module)
        for module in modules()
        if "helpers/models/" not in str(module) and "simpletuner/demo/" not in str(module)
        if FAMILY_NAMES.search(module.path.read_text(encoding="utf-8"))
    }
    assert_only(found, allowed=NAMES_FAMILIES)
