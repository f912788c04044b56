"""Optional packages, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
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
        raise MissingDependencyError(f"{module} cannot be imported ({error}). {_remedy(extra)}") from error


def check_installed(module: str, *, extra: str, needed_for: str) -> None:
    """Refuse to go on without a package that will be needed later; nothing is imported.

    Raises:
        MissingDependencyError: The package is not installed; the message names the extra that brings it.
    """
    if find_spec(module) is None:
        raise MissingDependencyError(f"{needed_for} needs {module}, which is not installed. {_remedy(extra)}")


def _remedy(extra: str) -> str:
    return f'Run: pip install "simpletuner-t[{extra}]", in a clone: pip install -e ".[{extra}]"'
