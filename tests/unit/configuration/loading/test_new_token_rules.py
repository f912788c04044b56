"""The keys of a new token: their values, and what they do not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from simpletuner.helpers.configuration.text.secrets import without_secrets
from simpletuner.helpers.models.registry import specs

if TYPE_CHECKING:
    from conftest import Workspace

TOKEN: dict[str, object] = {"placeholder_token": "<my-cat>", "initializer_token": "cat"}
ALONE: dict[str, object] = {"model_type": "embedding", "lora_type": "standard", "lycoris_config": None}


@pytest.mark.parametrize("keys", [{}, {"num_vectors": 4, "embedding_lr": 5e-3}], ids=["defaults", "all"])
@pytest.mark.parametrize("kind", [{}, ALONE], ids=["beside", "alone"])
def test_a_token_is_read_and_written_again(
    workspace: Workspace, keys: dict[str, object], kind: dict[str, object]
) -> None:
    config = workspace.load(**TOKEN, **keys, **kind)
    assert config.trains_text
    assert dict(config.new_tokens) == {"num_vectors": 1, "embedding_lr": None} | TOKEN | keys
    assert config.resolved()["placeholder_token"] == "<my-cat>"
    workspace.config = dict(config.resolved())
    assert workspace.load().new_tokens == config.new_tokens


def test_the_names_of_kohyas_scripts_are_other_names(workspace: Workspace) -> None:
    config = workspace.load(token_string="<my-cat>", init_word="cat", num_vectors_per_token="2")
    assert dict(config.new_tokens) == TOKEN | {"num_vectors": 2, "embedding_lr": None}


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"placeholder_token": "my cat"}, "placeholder_token"),
        ({"placeholder_token": "cat,dog"}, "placeholder_token"),
        ({"placeholder_token": "a\u200bcat"}, "placeholder_token"),
        ({"placeholder_token": "c" * 65}, "placeholder_token"),
        ({"initializer_token": None}, "initializer_token"),
        ({"initializer_token": " "}, "initializer_token"),
        ({"num_vectors": 0}, "num_vectors"),
        ({"num_vectors": 65}, "num_vectors"),
        ({"embedding_lr": 0}, "embedding_lr"),
        ({"embedding_lr": "fast"}, "embedding_lr"),
        ({"placeholder_token": None}, "initializer_token"),
        ({"placeholder_token": None, "initializer_token": None, "num_vectors": 2}, "num_vectors"),
        ({"placeholder_token": None, "initializer_token": None, "embedding_lr": 1}, "embedding_lr"),
        ({"text_encoder_1_precision": "int8-torchao"}, "text_encoder_1_precision"),
        ({"text_encoder_2_precision": "nf4-bnb"}, "text_encoder_2_precision"),
        ({"optimizer": "prodigy", "learning_rate": 1, "embedding_lr": 0.5}, "embedding_lr"),
        ({"learned_embeds": "a.safetensors"}, "learned_embeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_value_that_does_not_fit_is_refused_at_its_key(
    workspace: Workspace, keys: dict[str, object], key: str
) -> None:
    problems = workspace.problems(**TOKEN | keys)
    assert f"{key} " in problems
    assert "1 problem" in problems


def test_prodigy_takes_its_one_rate(workspace: Workspace) -> None:
    workspace.load(**TOKEN, optimizer="prodigy", learning_rate=1, embedding_lr=1)


UNTRAINED = [name for name, spec in specs().items() if not spec.text_encoder_lora_targets]


@pytest.mark.parametrize("family", UNTRAINED)
def test_other_families_refuse_a_token_by_name(workspace: Workspace, family: str) -> None:
    workspace.families = specs()
    problems = workspace.problems(**TOKEN, model_family=family)
    assert "placeholder_token" in problems
    assert f"of {family} " in problems


def test_a_whole_model_refuses_a_token(workspace: Workspace) -> None:
    whole = ALONE | {"model_type": "full"}
    assert "placeholder_token" in workspace.problems(**TOKEN, **whole)
    workspace.load(**whole | {"placeholder_token": None, "initializer_token": None})


def test_a_token_alone_has_no_adapter_and_its_own_title(workspace: Workspace) -> None:
    config = workspace.load(**TOKEN, **ALONE)
    assert (config.lycoris, config.algorithm.title) == (None, "Textual inversion")


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"placeholder_token": None, "initializer_token": None}, "placeholder_token"),
        ({"lora_type": "lycoris", "lycoris_config": "lycoris.json"}, "lora_type"),
        ({"lora_rank": 4}, "lora_rank"),
        ({"train_text_encoder": True}, "train_text_encoder"),
        ({"layer_filter": ["attn"]}, "layer_filter"),
    ],
    ids=["no token", "lycoris", "rank", "text encoders", "whole model"],
)
def test_a_token_alone_refuses_what_it_cannot_have(
    workspace: Workspace, keys: dict[str, object], key: str
) -> None:
    assert f"{key} " in workspace.problems(**TOKEN | ALONE | keys)


def test_a_token_alone_is_no_slider(workspace: Workspace) -> None:
    workspace.image_folder("more")
    entries: list[Any] = [
        {"id": "plus", "instance_data_dir": "images", "slider_strength": 1},
        {"id": "minus", "instance_data_dir": "more", "slider_strength": -1},
    ]
    workspace.datasets = entries
    assert "slider_strength" in workspace.problems(**TOKEN, **ALONE)


def test_the_words_of_a_token_are_no_secret() -> None:
    words: dict[str, object] = {**TOKEN, "hub_token": "abc"}
    assert without_secrets(words) == {**TOKEN, "hub_token": "(hidden)"}
