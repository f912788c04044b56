"""{env:VAR} placeholders: replaced by the variable's value, remembered so that the value is shown nowhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from simpletuner.helpers.configuration.text.problems import SHORTEST_SECRET, Problems, shown

_ENVIRONMENT = re.compile(r"\{env:([^{}]*)\}")


@dataclass
class Environment:
    """The environment variables that placeholders name, and those that were used."""

    variables: Mapping[str, str]
    problems: Problems
    used: dict[str, str] = field(default_factory=dict)
    """Value of every variable that was put into free text -> its placeholder."""

    def filled(self, value: JsonValue, *, source: str, key: str, is_text: bool = True) -> JsonValue:
        """The value with every placeholder replaced, at any depth; a variable that is not set is noted.

        Args:
            value: As the user wrote it.
            source: The file, for messages.
            key: Where in the file.
            is_text: Whether the variable may be a secret; a number or one of several choices is not.
        """
        if isinstance(value, str):
            return _ENVIRONMENT.sub(lambda match: self._value(match[1], source, key, is_text=is_text), value)
        if isinstance(value, list):
            return [
                self.filled(each, source=source, key=f"{key}[{index}]", is_text=is_text)
                for index, each in enumerate(value)
            ]
        if isinstance(value, dict):
            return {
                name: self.filled(each, source=source, key=f"{key}.{name}".strip("."), is_text=is_text)
                for name, each in value.items()
            }
        return value

    def _value(self, name: str, source: str, key: str, *, is_text: bool) -> str:
        name = name.strip()
        placeholder = f"{{env:{name}}}"
        if name not in self.variables:
            text = f"the environment variable {shown(name)} is not set. Set it, or write the value."
            self.problems.add(source, key, text)
            return placeholder
        value = self.variables[name]
        if is_text and len(value) >= SHORTEST_SECRET:
            self.used[value] = placeholder
            self.problems.hide(value, placeholder)
        return value
