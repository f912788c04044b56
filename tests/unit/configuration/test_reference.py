"""The reference page is complete and up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS
from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.loading.translation import tables
from simpletuner.helpers.configuration.loading.unsupported_keys import unsupported_keys
from simpletuner.helpers.configuration.reference import reference
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models import registry

SPEC = ModelSpec("toy", {"small": "somebody/toy"}, "small", ("epsilon",), 32, 8, 512, ("to_q",))


@pytest.fixture(scope="module")
def page() -> str:
    return reference({"toy": SPEC})


def rows(page: str) -> dict[str, str]:
    """Key -> its row, of the tables that describe keys one by one."""
    described, _, _ = page.partition("## Known from SimpleTuner")
    lines = [line for line in described.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


@pytest.mark.parametrize("table", [KEYS.owners, DatasetConfig.model_fields, ARGUMENTS])
def test_every_key_has_a_row(page: str, table: dict[str, object]) -> None:
    assert not table.keys() - rows(page).keys()


def test_every_algorithm_alias_and_unsupported_key_is_named(page: str) -> None:
    unsupported = [*unsupported_keys("config.json"), *unsupported_keys("dataset")]
    for name in [*ALGORITHMS, *tables("config.json").aliases, *unsupported]:
        assert f"`{name}`" in page
    assert "`extra`" not in page
    assert "`raw`" not in page


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("vae_batch_size", "| `vae_batch_size` | whole number ≥ 1 | `1` |"),
        ("lora_dropout", "| `lora_dropout` | number ≥ 0, < 1 | `0.0` |"),
        ("model_family", "| `model_family` | text | **required** |"),
        ("mixed_precision", '| `mixed_precision` | `bf16`, `fp16`, `no` | `"bf16"` |'),
        ("snr_gamma", "| `snr_gamma` | number > 0, `null` | `null` |"),
        ("gradient_checkpointing", "| `gradient_checkpointing` | true, false | `true` |"),
        ("tlora_init", '| `tlora_init` | `random`, `weight`, `vanilla` | `"random"` |'),
    ],
)
def test_a_row_says_what_is_allowed_and_the_default(page: str, key: str, row: str) -> None:
    assert rows(page)[key].startswith(row)


def test_tables_have_four_cells_in_every_row(page: str) -> None:
    for key in [*KEYS.owners, *LycorisConfig.model_fields.keys() - {"extra", "raw"}]:
        cells = rows(page)[key].replace("\\|", "").count("|")
        assert cells == 5, key


def test_the_committed_page_is_what_the_code_makes(repository: Path) -> None:
    committed = (repository / "documentation" / "config-reference.md").read_text(encoding="utf-8")
    assert committed == reference(registry.specs()), "run: simpletuner config-reference --output FILE"
