"""The keys of trained text encoders: their values, and what they do not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from simpletuner.helpers.configuration.schema.text_encoders import TextEncoderConfig
from simpletuner.helpers.models.registry import specs

if TYPE_CHECKING:
    from conftest import Workspace

ON = {"train_text_encoder": True}


@pytest.mark.parametrize(
    ("value", "rates", "trained"),
    [
        (None, (None, None), [True, True]),
        ("", (None, None), [True, True]),
        (1e-5, (1e-5, 1e-5), [True, True]),
        ("1e-5, 2e-5", (1e-5, 2e-5), [True, True]),
        ([0, 2e-5], (0, 2e-5), [False, True]),
        ("[1e-5,0]", (1e-5, 0), [True, False]),
    ],
    ids=str,
)
def test_one_rate_is_for_both_encoders_and_two_for_each(
    value: object, rates: tuple[float, float], trained: list[bool]
) -> None:
    section = TextEncoderConfig.model_validate({**ON, "text_encoder_lr": value})
    assert tuple(section.rate_of(index) for index in range(2)) == rates
    assert [section.trains(index) for index in range(2)] == trained


@pytest.mark.parametrize("value", ["1,2,3", "fast", -1, [0, 0], 0], ids=str)
def test_a_value_that_is_no_rate_is_refused_at_its_key(value: object) -> None:
    with pytest.raises(ValidationError, match=r"text_encoder_lr|no text encoder"):
        TextEncoderConfig.model_validate({**ON, "text_encoder_lr": value})


def test_no_encoder_is_trained_without_the_switch() -> None:
    assert not TextEncoderConfig(text_encoder_lr=(1e-5,)).trains(0)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"text_encoder_1_precision": "int8-torchao"}, "text_encoder_1_precision"),
        ({"text_encoder_2_precision": "nf4-bnb"}, "text_encoder_2_precision"),
        ({"optimizer": "prodigy", "learning_rate": 1, "text_encoder_lr": 0.5}, "text_encoder_lr"),
        ({"optimizer": "prodigyplus", "learning_rate": 1, "text_encoder_lr": [1, 0.5]}, "text_encoder_lr"),
    ],
    ids=["first precision", "second precision", "prodigy", "prodigyplus"],
)
def test_keys_that_trained_text_encoders_do_not_go_with_are_named(
    workspace: Workspace, keys: dict[str, object], key: str
) -> None:
    assert key in workspace.problems(**ON, **keys)
    workspace.load(**keys | {"train_text_encoder": False})


@pytest.mark.parametrize("rate", [[1, 0], 1], ids=str)
def test_prodigy_takes_the_rates_that_it_can(workspace: Workspace, rate: object) -> None:
    workspace.load(**ON, optimizer="prodigy", learning_rate=1, text_encoder_lr=rate)


def test_a_rank_that_stands_for_whole_matrices_needs_another_for_text_encoders(workspace: Workspace) -> None:
    workspace.lycoris |= {"algo": "lokr", "linear_dim": 10000}
    workspace.lycoris.pop("tlora_min_rank", None)
    assert "text_encoder_lora_rank" in workspace.problems(**ON, lora_type="lycoris")
    workspace.load(**ON, lora_type="lycoris", text_encoder_lora_rank=16)


UNTRAINED = [name for name, spec in specs().items() if not spec.text_encoder_lora_targets]


@pytest.mark.parametrize("family", UNTRAINED)
def test_other_families_refuse_trained_text_encoders_by_name(workspace: Workspace, family: str) -> None:
    workspace.families = specs()
    problems = workspace.problems(**ON, model_family=family)
    assert "train_text_encoder" in problems
    assert f"of {family} " in problems
