"""The model families. Imports no torch until a family is loaded."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.memory_model import FamilyMemory

if TYPE_CHECKING:
    from simpletuner.helpers.models.family import ModelFamily

FAMILIES = {
    "flux": "simpletuner.helpers.models.flux.family:Flux",
    "flux2": "simpletuner.helpers.models.flux2.family:Flux2",
    "sdxl": "simpletuner.helpers.models.sdxl.family:SDXL",
}


def specs() -> dict[str, ModelSpec]:
    """Family name -> spec, without importing torch or diffusers."""
    return {name: _spec_of(target) for name, target in FAMILIES.items()}


facts = specs
"""Name of `specs` for callers outside the package."""


def load_family(name: str) -> type[ModelFamily]:
    """Import the class of one family, and with it torch and diffusers.

    Raises:
        ModelError: The name is unknown.
    """
    if name not in FAMILIES:
        raise ModelError(
            f"model_family {name!r} is unknown. Known: {', '.join(sorted(FAMILIES))}. "
            "Set model_family to one of them."
        )
    module, _, class_name = FAMILIES[name].partition(":")
    return cast("type[ModelFamily]", getattr(import_module(module), class_name))


def memory_of(name: str) -> FamilyMemory | None:
    """What the memory model knows of a family; None if it has no module for it."""
    module = f"{_folder_of(FAMILIES[name])}.memory"
    return cast(FamilyMemory, import_module(module)) if find_spec(module) else None


def _spec_of(target: str) -> ModelSpec:
    return cast(ModelSpec, import_module(f"{_folder_of(target)}.spec").SPEC)


def _folder_of(target: str) -> str:
    return target.partition(":")[0].rpartition(".")[0]
