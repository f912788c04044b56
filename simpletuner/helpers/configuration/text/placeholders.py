"""{env:VAR} placeholders: replaced for the run, kept in messages and in files that the run writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from simpletuner.helpers.configuration.text.problems import SHORTEST_SECRET, Problems, shown

_ENVIRONMENT = re.compile(r"\{env:([^{}]*)\}")


@dataclass
class Environment:
    """Replaces placeholders by environment variables and remembers which values may be secrets."""

    variables: Mapping[str, str]
    problems: Problems
    secrets: dict[str, str] = field(default_factory=dict)
    """Value of each variable inside free text -> its placeholder."""

    def fill(self, value: JsonValue, *, source: str, key: str, is_text: bool = True) -> JsonValue:
        """Replace every placeholder at any depth; notes each variable that is not set.

        Args:
            value: The value as written.
            source: The file, for messages.
            key: The key in the file, for messages.
            is_text: Free text may hold a secret; a number or a choice cannot.
        """
        if isinstance(value, str):
            return _ENVIRONMENT.sub(lambda match: self._value(match[1], source, key, is_text=is_text), value)
        if isinstance(value, list):
            return [
                self.fill(each, source=source, key=f"{key}[{index}]", is_text=is_text)
                for index, each in enumerate(value)
            ]
        if isinstance(value, dict):
            return {
                name: self.fill(each, source=source, key=f"{key}.{name}".strip("."), is_text=is_text)
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
            self.secrets[value] = placeholder
            self.problems.hide(value, placeholder)
        return value
