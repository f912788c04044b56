"""Records of choices: plain data that names the implementation and imports it on use."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeVar

from simpletuner.helpers.io.optional import require

ArgumentType = Literal[
    "boolean", "count", "count or zero", "positive", "number", "fraction", "factor", "betas"
]
"""number: 0 or above; fraction: 0 to 1; factor: 1 or above, or -1; betas: numbers from 0 to below 1."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One value of a choice."""

    name: str
    """Value in the configuration."""
    summary: str
    """Its line in the reference page."""
    display_name: str = ""
    """Title in images and reports. Default: name."""
    aliases: tuple[str, ...] = ()
    """Other spellings in the configuration."""
    build: str = ""
    """Implementation as "module:name"; empty for a value that needs none."""
    package: str = ""
    """Import name of the optional package that the implementation needs."""
    extra: str = ""
    """Extra of this package that installs it."""

    @property
    def title(self) -> str:
        """Name for people."""
        return self.display_name or self.name

    def load(self) -> Any:
        """Import the implementation.

        Raises:
            MissingDependencyError: Its optional package is not installed.
        """
        if self.package:
            require(self.package, extra=self.extra)
        module, _, name = self.build.partition(":")
        return getattr(import_module(module), name)


C = TypeVar("C", bound=Choice)


class Registry(dict[str, C]):
    """Name -> record, in the order of the reference page."""

    def __init__(self, *records: C) -> None:
        super().__init__()
        for record in records:
            self.register(record)

    def register(self, record: C) -> C:
        """Add a record; the same record twice counts once.

        Raises:
            ValueError: Another record has one of its names.
        """
        for name in (record.name, *record.aliases):
            known = self.named(name)
            if known is not None and known != record:
                raise ValueError(f"{name!r} names {known} already, so it cannot name {record}.")
        self[record.name] = record
        return record

    def named(self, value: object) -> C | None:
        """The record with this name or alias."""
        return next((each for each in self.values() if value in (each.name, *each.aliases)), None)
