"""Optional packages, imported on use."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from simpletuner.helpers.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingDependencyError: The package is not installed; the message names the extra that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{module} cannot be imported ({error}). {_remedy(extra)}") from error


def check_installed(module: str, *, extra: str, needed_for: str) -> None:
    """Check for a package that is needed later, without importing it.

    Raises:
        MissingDependencyError: The package is not installed; the message names the extra that installs it.
    """
    if find_spec(module) is None:
        raise MissingDependencyError(f"{needed_for} needs {module}, which is not installed. {_remedy(extra)}")


def _remedy(extra: str) -> str:
    return f'Run: pip install "simpletuner-t[{extra}]", in a clone: pip install -e ".[{extra}]"'
