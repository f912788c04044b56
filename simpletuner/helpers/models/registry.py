"""Which families there are; nothing here imports torch until a family is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ModelError

if TYPE_CHECKING:
    from simpletuner.helpers.models.family import ModelFamily

FAMILIES = {
    "flux": "simpletuner.helpers.models.flux.family:Flux",
    "flux2": "simpletuner.helpers.models.flux2.family:Flux2",
    "sdxl": "simpletuner.helpers.models.sdxl.family:SDXL",
}


def specs() -> dict[str, ModelSpec]:
    """The spec of every family by its name, without importing torch or diffusers."""
    return {name: _spec_of(target) for name, target in FAMILIES.items()}


facts = specs
"""The name that callers outside the package know `specs` by."""


def load_family(name: str) -> type[ModelFamily]:
    """Import the class of one family, and with it torch and diffusers.

    Raises:
        ModelError: There is no family of that name.
    """
    if name not in FAMILIES:
        raise ModelError(
            f"model_family {name!r} is not known. Known families: {', '.join(sorted(FAMILIES))}. "
            "Set model_family to one of them."
        )
    module, _, class_name = FAMILIES[name].partition(":")
    return cast("type[ModelFamily]", vars(import_module(module))[class_name])


def _spec_of(target: str) -> ModelSpec:
    folder = target.partition(":")[0].rpartition(".")[0]
    return cast(ModelSpec, vars(import_module(f"{folder}.spec"))["SPEC"])
