"""The tables hold facts that the loader agrees with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.helpers.choices.losses import LOSSES
from simpletuner.helpers.choices.lr_schedules import LR_SCHEDULES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS
from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.migration import report
from simpletuner.helpers.configuration.migration.table import PROGRAMS, Program, Row, load_table
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.models import registry

REGISTRIES = {
    "loss_type": LOSSES,
    "optimizer": OPTIMIZERS,
    "lr_scheduler": LR_SCHEDULES,
    "validation_noise_scheduler": SAMPLERS,
    "base_model_precision": PRECISIONS,
}
PAGE = "documentation/migrating.md"


def _rows() -> Iterator[tuple[Program, str, Row]]:
    for program in PROGRAMS:
        for place, rows in load_table(program).groups.items():
            for row in rows:
                yield program, place, row


def test_no_key_stands_in_two_rows_of_a_place() -> None:
    for program in PROGRAMS:
        for place, rows in load_table(program).groups.items():
            twice = [
                key for key, number in Counter(key for row in rows for key in row.keys).items() if number > 1
            ]
            assert not twice, f"{program} {place}"


def test_a_row_that_the_table_applies_names_one_of_our_keys() -> None:
    known = {*DatasetConfig.model_fields, *KEYS.owners}
    unknown = {
        f"{program} {row.keys}: {row.ours}"
        for program, _, row in _rows()
        if row.ours and not row.is_computed and row.ours not in known
    }
    assert not unknown


def test_values_of_choices_are_registered() -> None:
    wrong = {
        f"{program} {row.keys}: {value.ours}"
        for program, _, row in _rows()
        if row.ours in REGISTRIES
        for value in row.values.values()
        if value.ours not in REGISTRIES[row.ours]
    }
    assert not wrong


def test_what_is_not_translated_or_differs_says_what_happens_instead() -> None:
    silent = {
        f"{program} {row.keys}"
        for program, _, row in _rows()
        if row.outcome == "not translated" and not row.text
    }
    silent |= {
        f"{program} {row.keys} {name}"
        for program, _, row in _rows()
        for name, value in row.values.items()
        if value.outcome in ("not translated", "approximate") and not (value.text or row.text)
    }
    assert not silent


def test_families_and_flavours_of_the_tables_exist() -> None:
    specs = registry.specs()
    facts = [
        *load_table("kohya").facts["scripts"].values(),
        *load_table("ai-toolkit").facts["architectures"].values(),
        *load_table("onetrainer").facts["model_types"].values(),
        *load_table("diffusers").facts["scripts"].values(),
    ]
    accepted = [fact for fact in facts if "refused" not in fact]
    assert len(accepted) > 10
    for fact in accepted:
        spec = specs[fact["model_family"]]
        assert fact.get("model_flavour", spec.default_flavour) in spec.flavours


@pytest.mark.parametrize("family", ["sdxl", "flux", "flux2"])
def test_target_classes_of_the_tables_are_those_of_the_family(family: str) -> None:
    sides = registry.specs()[family].layer_sides
    known = {name for classes in sides.values() for name in classes}
    presets = [
        *load_table("kohya").facts["lycoris_presets"].get(family, {}).values(),
        *(
            value
            for key, value in load_table("ai-toolkit").facts["presets"].items()
            if key.split()[0] == family
        ),
    ]
    assert presets
    for preset in presets:
        assert set(preset["target_module"]) <= known


def test_the_page_has_the_tables(repository: Path) -> None:
    assert report.documentation_tables() in (repository / PAGE).read_text(encoding="utf-8")
