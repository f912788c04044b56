"""Optional packages, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from simpletuner.helpers.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: The package is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        fix = f'pip install "simpletuner[{extra}]"'
        raise MissingDependencyError(f"{module} cannot be imported ({error}). Run: {fix}") from error
