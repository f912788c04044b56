"""The texts of `simpletuner init` in each language: questions, messages, evidence and the page of a run."""

from __future__ import annotations

import json
import locale
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Literal

Language = Literal["en", "ja"]
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one language."""

    language: Language

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key with its values."""
        return _table("texts.json")[self.language][key].format(**values)

    def evidence(self, key: str) -> str:
        """What is known about one choice of a preset."""
        return _table("evidence.json")[self.language][key]

    def readme(self, **values: object) -> str:
        """The page of a new configuration."""
        return Template(readme_file(self.language).read_text(encoding="utf-8")).substitute(values)


def readme_file(language: Language) -> Path:
    """The page of a new configuration, with names of values."""
    return _FOLDER / f"readme.{language}.md"


def language_of_locale() -> Language:
    """Japanese where the environment or the system says so, else English."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    chosen = next((name for name in names if name), None) or locale.getlocale()[0] or ""
    return "ja" if chosen.lower().startswith("ja") else "en"


@cache
def _table(name: str) -> Mapping[Language, Mapping[str, str]]:
    content: Mapping[Language, Mapping[str, str]] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return content
