"""Both languages of `simpletuner init` say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Formatter, Template

import pytest

from simpletuner.helpers.new_run import texts as module
from simpletuner.helpers.new_run.presets import models
from simpletuner.helpers.new_run.texts import Texts, language_of_locale, readme_file

FOLDER = Path(module.__file__).parent
ADDRESS = re.compile(r"https://[\w./-]+|arXiv \d+\.\d+|documentation/[\w-]+\.md")
NUMBER = re.compile(r"(?<![\w.])\.\d\d+")
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def _table(name: str) -> dict[str, dict[str, str]]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["texts.json", "evidence.json"])
def test_both_languages_have_the_same_keys_and_values(name: str) -> None:
    table = _table(name)
    assert list(table["en"]) == list(table["ja"])
    assert len(table["en"]) > 15
    differing = [key for key, text in table["en"].items() if _values(text) != _values(table["ja"][key])]
    assert not differing


def _values(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in Formatter().parse(text) if name is not None)


def test_evidence_names_the_same_sources_and_numbers_in_both_languages() -> None:
    table = _table("evidence.json")
    for key, text in table["en"].items():
        assert sorted(ADDRESS.findall(text)) == sorted(ADDRESS.findall(table["ja"][key])), key
        assert sorted(NUMBER.findall(text)) == sorted(NUMBER.findall(table["ja"][key])), key


def test_every_piece_of_evidence_is_known_and_read() -> None:
    presets = [preset for model in models().values() for preset in model.purposes.values()]
    assert {key for preset in presets for key in preset.evidence} == set(_table("evidence.json")["en"])


def test_japanese_texts_are_japanese() -> None:
    same = {"presets_for"}
    untranslated = [
        key
        for name in ("texts.json", "evidence.json")
        for key, text in _table(name)["ja"].items()
        if key not in same and not JAPANESE.search(text)
    ]
    assert not untranslated


def test_both_pages_have_the_same_values_headings_and_code() -> None:
    english, japanese = (readme_file(language).read_text(encoding="utf-8") for language in ("en", "ja"))
    assert sorted(set(Template(english).get_identifiers())) == sorted(
        set(Template(japanese).get_identifiers())
    )
    for pattern in (r"^#+ ", r"^\|", r"^- ", r"^```\w*$"):
        found = [len(re.findall(pattern, page, re.MULTILINE)) for page in (english, japanese)]
        assert found[0] == found[1] > 0, pattern
    code = re.compile(r"`[^`\n]+`")
    assert sorted(code.findall(english)) == sorted(code.findall(japanese))


@pytest.mark.parametrize(
    ("values", "language"),
    [
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "ja_JP"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "", "LC_MESSAGES": "C"}, "en"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_the_language_is_the_locales(
    values: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert language_of_locale() == language


def test_a_text_takes_its_values() -> None:
    assert Texts("en")("images_line", count=2, folder="photos") == "2 in photos"
    assert Texts("ja")("images_line", count=2, folder="photos") == "photos の 2 枚"
