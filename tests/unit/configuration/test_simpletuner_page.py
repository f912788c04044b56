"""The page for people who come from SimpleTuner is complete and up to date."""

from __future__ import annotations

from pathlib import Path

from simpletuner.helpers.configuration.loading.config_forms import environment_names
from simpletuner.helpers.configuration.loading.defaults import differing_defaults
from simpletuner.helpers.configuration.loading.translation import tables
from simpletuner.helpers.configuration.simpletuner_page import simpletuner_page

PAGE = Path(__file__).parents[3] / "documentation/coming-from-simpletuner.md"


def test_the_committed_page_is_what_the_code_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == simpletuner_page()


def test_every_key_of_the_tables_is_named() -> None:
    page, table = simpletuner_page(), tables("config.json")
    keys = [key for entry in (*table.no_effect, *table.renamed) for key in entry.keys]
    keys += [*table.aliases, *table.arguments, *(each.key for each in differing_defaults())]
    keys += environment_names()
    assert not [key for key in keys if f"`{key}`" not in page]
