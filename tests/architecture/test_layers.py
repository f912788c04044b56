"""Imports point down, and each library has its place."""

from __future__ import annotations

import re
import sys
import tomllib

from tests.architecture.package_source import (
    PACKAGE,
    REPOSITORY,
    folder_of,
    graph,
    imports,
    is_module,
    modules,
)

# Lowest first; units of one layer do not import each other.
LAYERS = (
    ("package", "errors", "contracts", "randomness"),
    ("io",),
    ("choices",),
    ("configuration",),
    ("adapters", "caching"),
    ("data", "models", "publishing"),
    ("estimating",),
    ("checkpointing",),
    ("reporting", "sampling"),
    ("training",),
    ("new_run",),
    ("entry",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Folder -> its parts that have an order, lowest first: none imports a later one. Every part is held by the
# test against circles besides.
NESTED = {
    "adapters": ("tlora", "files", "network", "inference"),
    "configuration": ("text", "schema", "loading", "load", "reference", "migration"),
    "reporting": ("metrics", "html_report", "data_page", "compare_page"),
    "training": ("trainer", "build", "runs"),
}

# The demo is SDXL and makes its model from that family's parts.
FAMILY_USERS = ("simpletuner.demo.",)

# Library -> where it may be imported, as the start of a path below simpletuner/.
PLACES = {
    "accelerate": ("helpers/training/", "helpers/sampling/", "helpers/reporting/", "helpers/checkpointing/"),
    "diffusers": ("helpers/models/", "helpers/adapters/pipeline.py"),
    "transformers": ("helpers/models/",),
    "tokenizers": ("helpers/models/",),
    "lycoris": ("helpers/adapters/",),
    "peft": ("helpers/adapters/",),
    "fsspec": ("helpers/io/",),
    "filelock": ("helpers/io/",),
    "huggingface_hub": ("helpers/models/", "helpers/publishing/", "helpers/data/sources/hub.py"),
    "pydantic": ("helpers/configuration/",),
    "yaml": ("helpers/configuration/migration/", "helpers/publishing/"),
    "typer": (
        "cli.py",
        "cli_cache.py",
        "cli_compare.py",
        "cli_data.py",
        "cli_estimate.py",
        "cli_files.py",
        "cli_init.py",
        "cli_options.py",
        "cli_runs.py",
        "cli_sample.py",
    ),
    "wandb": ("helpers/reporting/",),
    "tensorboard": ("helpers/reporting/",),
    "trackio": ("helpers/reporting/",),
    "matplotlib": ("demo/comparison/",),
}

# Distribution name where it differs from the import name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "lycoris": "lycoris-lora",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
}
# Brought by a declared dependency that cannot do without it.
BROUGHT_BY = {"tokenizers": "transformers", "pydantic_core": "pydantic"}


def test_imports_point_to_a_lower_layer_or_the_same_folder() -> None:
    wrong = [
        f"{module}:{each.line} {each.target}"
        for module in modules()
        for each in imports(module)
        if each.target.split(".")[0] == "simpletuner"
        and not _points_down(module.folder, folder_of(each.target))
    ]
    assert not wrong, f"sideways or upwards: {wrong}"


def _points_down(source: str, target: str) -> bool:
    return source == target or LEVEL[target] < LEVEL[source]


def test_every_folder_has_a_layer() -> None:
    unknown = {module.folder for module in modules()} - LEVEL.keys() - {"__init__"}
    assert not unknown, f"say in LAYERS where {sorted(unknown)} belong"


def test_parts_of_a_folder_keep_their_order() -> None:
    wrong = [
        f"{source} imports {target}"
        for folder, order in NESTED.items()
        for source, targets in graph().items()
        for target in targets
        if not _keeps_order(_part(source, folder), _part(target, folder), order)
    ]
    assert not wrong, f"against NESTED: {wrong}"
    unknown = [
        f"{folder}.{part}"
        for folder, order in NESTED.items()
        for part in order
        if not is_module(f"{_HELPERS}.{folder}.{part}")
    ]
    assert not unknown, f"in NESTED and not in the package: {unknown}"


def _part(dotted: str, folder: str) -> str:
    """The subfolder, or the module directly in the folder, that holds a module; "" for one of elsewhere."""
    inside = dotted.removeprefix(f"{_HELPERS}.{folder}.")
    return "" if inside == dotted else inside.split(".")[0]


def _keeps_order(source: str, target: str, order: tuple[str, ...]) -> bool:
    if source not in order or target not in order:
        return True
    return order.index(target) <= order.index(source)


_HELPERS = "simpletuner.helpers"


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = graph()
    # What imports nothing that is left is in no circle, and neither is what nothing left imports.
    while outside := left.keys() - _in_both_directions(left):
        left = {name: targets - outside for name, targets in left.items() if name not in outside}
    assert not left, f"each is imported by another of these: {left}"


def _in_both_directions(graph: dict[str, set[str]]) -> set[str]:
    return {name for name, targets in graph.items() if targets} & set().union(*graph.values())


def test_libraries_are_imported_in_their_place_only() -> None:
    wrong = [
        f"{module}:{each.line} {each.target}"
        for module in modules()
        for each in imports(module)
        if not module.path.relative_to(PACKAGE)
        .as_posix()
        .startswith(PLACES.get(each.target.split(".")[0], ("",)))
    ]
    assert not wrong, f"{wrong}; places are {PLACES}"


def test_no_module_imports_a_model_family_but_its_own_folder() -> None:
    families = {path.parent.name for path in (PACKAGE / "helpers" / "models").glob("*/family.py")}
    assert len(families) >= 3, "the families were not found"
    wrong = [
        f"{source} imports {target}"
        for source, targets in graph().items()
        for target in targets
        if (family := _part(target, "models")) in families
        and _part(source, "models") != family
        and not source.startswith(FAMILY_USERS)
    ]
    assert not wrong


def test_every_third_party_import_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [each for extra in extras.values() for each in extra]
    declared = {re.split(r"[<>=!~\[; ]", each)[0] for each in requirements}
    known = sys.stdlib_module_names | {"simpletuner"}
    undeclared = [
        f"{module}:{each.line} {root}"
        for module in modules()
        for each in imports(module)
        if (root := each.target.split(".")[0]) not in known
        and BROUGHT_BY.get(root, DISTRIBUTIONS.get(root, root)) not in declared
    ]
    assert not undeclared, f"not named in pyproject.toml: {undeclared}"
