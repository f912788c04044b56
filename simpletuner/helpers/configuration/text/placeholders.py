"""{env:VAR} placeholders: replaced for the run, kept in messages and in files that the run writes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from simpletuner.helpers.configuration.text.problems import Problems, shown
from simpletuner.helpers.io.redaction import PLACEHOLDER, hide


@dataclass
class Environment:
    """Replaces placeholders by environment variables, and hides the values that may be secrets."""

    variables: Mapping[str, str]
    problems: Problems
    without_text: Callable[[], Container[str]] = tuple
    """Keys of the lycoris json and the dataset json that hold a number or a choice."""

    def fill(self, value: JsonValue, *, source: str, key: str, is_text: bool = True) -> JsonValue:
        """Replace every placeholder at any depth; notes each variable that is not set.

        Args:
            value: The value as written.
            source: The file, for messages.
            key: The key in the file, for messages.
            is_text: Free text may hold a secret; a number or a choice cannot, and is shown.
        """
        if isinstance(value, str):
            return PLACEHOLDER.sub(lambda match: self._value(match[1], source, key, is_text=is_text), value)
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
        innermost = key.rpartition(".")[2].partition("[")[0].removeprefix("--")
        if is_text and innermost not in self.without_text():
            hide(value, placeholder)
        return value
