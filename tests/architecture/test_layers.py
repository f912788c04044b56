"""Imports point down, and each library has its place."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
from package_source import PACKAGE, REPOSITORY, Module, folder_of, imports, modules

# Lowest first; units of one layer do not import each other.
LAYERS = (
    ("package", "errors", "contracts", "randomness"),
    ("io",),
    ("choices",),
    ("configuration",),
    ("adapters", "caching"),
    ("data", "models", "publishing"),
    ("checkpointing",),
    ("reporting", "sampling"),
    ("training",),
    ("entry",),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

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
    "huggingface_hub": ("helpers/models/", "helpers/publishing/"),
    "pydantic": ("helpers/configuration/",),
    "typer": ("cli.py",),
    "wandb": ("helpers/reporting/",),
    "tensorboard": ("helpers/reporting/",),
    "matplotlib": ("demo/comparison/",),
}

# Distribution name where it differs from the import name.
DISTRIBUTIONS = {"PIL": "pillow", "lycoris": "lycoris-lora", "huggingface_hub": "huggingface-hub"}
# Brought by a declared dependency that cannot do without it.
BROUGHT_BY = {"tokenizers": "transformers", "pydantic_core": "pydantic"}


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_point_to_a_lower_layer_or_the_same_folder(module: Module) -> None:
    wrong = [
        f"line {each.line}: {each.target}"
        for each in imports(module)
        if each.target.split(".")[0] == "simpletuner"
        and not _points_down(module.folder, folder_of(each.target))
    ]
    assert not wrong, f"{module} imports sideways or upwards: {wrong}"


def _points_down(source: str, target: str) -> bool:
    return source == target or LEVEL[target] < LEVEL[source]


def test_every_folder_has_a_layer() -> None:
    unknown = {module.folder for module in modules()} - LEVEL.keys() - {"__init__"}
    assert not unknown, f"say in LAYERS where {sorted(unknown)} belong"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_libraries_are_imported_in_their_place_only(module: Module) -> None:
    place = module.path.relative_to(PACKAGE).as_posix()
    wrong = [
        f"line {each.line}: {each.target}"
        for each in imports(module)
        if not place.startswith(PLACES.get(each.target.split(".")[0], ("",)))
    ]
    assert not wrong, f"{module}: {wrong}; places are {PLACES}"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_family_does_not_import_another(module: Module) -> None:
    parts = module.path.relative_to(PACKAGE).parts
    if parts[:2] != ("helpers", "models") or len(parts) < 4:
        return
    families = {path.name for path in (PACKAGE / "helpers" / "models").iterdir() if path.is_dir()}
    named = {each.target.split(".")[3] for each in imports(module) if each.target.startswith(_MODELS + ".")}
    assert not named & (families - {parts[2]})


_MODELS = "simpletuner.helpers.models"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_every_third_party_import_is_declared(module: Module) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [each for extra in extras.values() for each in extra]
    declared = {re.split(r"[<>=!~\[; ]", each)[0] for each in requirements}
    roots = (
        {each.target.split(".")[0] for each in imports(module)} - {"simpletuner"} - sys.stdlib_module_names
    )
    needed = {BROUGHT_BY.get(root, DISTRIBUTIONS.get(root, root)) for root in roots}
    assert needed <= declared, (
        f"{module} imports what pyproject.toml does not name: {sorted(needed - declared)}"
    )
