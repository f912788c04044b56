"""New tokens in the text encoders of transformers: their embeddings, strength, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from simpletuner.helpers.adapters.files import embeddings
from simpletuner.helpers.adapters.files.embeddings import Embeddings
from simpletuner.helpers.adapters.new_tokens import (
    NewToken,
    TextPart,
    add_token,
    attach_embeddings,
    initial_rows,
)
from simpletuner.helpers.configuration.schema.new_tokens import NewTokenConfig
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.models.tiny_parts import (
    CLIP_END,
    clip_text_config,
    fill_weights,
    make_clip_tokenizer,
)

WIDTH = 32
TOKEN = "<my-cat>"
CLASSES = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def make_part(name: str = "text_encoder_2", *, seed: int = 0, **config: Any) -> TextPart:
    tokenizer = make_clip_tokenizer(pad=CLIP_END)
    settings = clip_text_config(tokenizer, width=WIDTH)
    for key, value in config.items():
        setattr(settings, key, value)
    encoder = CLASSES[name](settings)
    fill_weights(encoder, seed=seed)
    return TextPart(encoder.eval().requires_grad_(False), tokenizer)


@pytest.fixture
def part() -> TextPart:
    return make_part()


def ids_of(part: TextPart, prompt: str) -> Tensor:
    ids: Tensor = part.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    return ids


def states_of(part: TextPart, prompt: str) -> Tensor:
    states: Tensor = part.encoder(ids_of(part, prompt), output_hidden_states=True).hidden_states[-2]
    return states


def config_of(**keys: Any) -> NewTokenConfig:
    return NewTokenConfig(**{"placeholder_token": TOKEN, "initializer_token": "cat"} | keys)


def both() -> dict[str, TextPart]:
    return {name: make_part(name, seed=seed) for seed, name in enumerate(CLASSES)}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_without_the_token_are_encoded_as_before(name: str, dtype: torch.dtype) -> None:
    part = make_part(name)
    part.encoder.to(dtype)
    before = states_of(part, "a photo of a cat")
    added = add_token(part, TOKEN, torch.ones(2, WIDTH), start=torch.zeros(2, WIDTH))
    assert torch.equal(states_of(part, "a photo of a cat"), before)
    assert part.encoder.dtype == dtype
    assert added.rows.dtype == torch.float32


def test_a_prompt_with_the_token_has_its_embeddings_in_their_order(part: TextPart) -> None:
    rows = torch.randn(2, WIDTH)
    add_token(part, TOKEN, rows, start=rows)
    ids = ids_of(part, f"a {TOKEN} {TOKEN}_1 cat")
    found = part.encoder.get_input_embeddings()(ids)[0]
    assert torch.equal(found[2:4], rows)
    assert len(set(ids[0, :5].tolist())) == 5


def test_the_initial_embeddings_are_those_of_the_initializer(part: TextPart) -> None:
    base = part.encoder.get_input_embeddings().weight
    (cat,), (dog,) = part.ids_of("cat"), part.ids_of("dog")
    assert torch.equal(initial_rows(part, "cat", 1), base[[cat]])
    assert torch.equal(initial_rows(part, "cat dog", 3), base[[cat, dog, cat]])


@pytest.mark.parametrize(("strength", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (1.5, 1.5)])
def test_strength_lies_on_the_line_from_the_start(part: TextPart, strength: float, share: float) -> None:
    start, rows = torch.zeros(1, WIDTH), torch.ones(1, WIDTH)
    added = add_token(part, TOKEN, rows, start=start)
    added.set_strength(strength)
    found = part.encoder.get_input_embeddings()(ids_of(part, TOKEN))[0, 1]
    torch.testing.assert_close(found, torch.full((WIDTH,), share))


def test_at_strength_0_the_token_is_its_initializer_bit_for_bit() -> None:
    parts = both()
    token = NewToken(parts, config_of())
    for parameter in token.parameters():
        parameter.data.normal_()
    with token.switched_off():
        for part in parts.values():
            assert torch.equal(states_of(part, f"a {TOKEN}"), states_of(part, "a cat"))
    assert not torch.equal(states_of(part, f"a {TOKEN}"), states_of(part, "a cat"))


def test_gradients_reach_the_embeddings_of_the_token_alone() -> None:
    parts = both()
    token = NewToken(parts, config_of(num_vectors=2))
    for part in parts.values():
        states_of(part, f"a {TOKEN} {TOKEN}_1").square().sum().backward()
    assert all(bool(each.grad.abs().sum(dim=1).min() > 0) for each in token.parameters())
    weights = [weight for part in parts.values() for weight in part.encoder.parameters()]
    assert sum(weight.grad is not None for weight in weights) == len(token.parameters()) == 2


def test_the_group_has_its_rate_and_no_weight_decay() -> None:
    (group,) = NewToken(both(), config_of(embedding_lr=0.5)).groups()
    assert (group.learning_rate, group.weight_decay, group.end_step) == (0.5, 0.0, None)


def test_tokens_of_several_files_stand_beside_each_other(part: TextPart) -> None:
    rows = torch.randn(3, WIDTH)
    add_token(part, TOKEN, rows[:2], start=rows[:2])
    add_token(part, "<hat>", rows[2:], start=rows[2:])
    found = part.encoder.get_input_embeddings()(ids_of(part, f"{TOKEN} <hat> {TOKEN}_1"))[0]
    assert torch.equal(found[1:4], rows[[0, 2, 1]])


@pytest.mark.parametrize("name", CLASSES)
def test_the_pooled_embedding_is_that_of_the_end_whatever_the_configuration_names(name: str) -> None:
    part = make_part(name, eos_token_id=2)
    inner = part.encoder if name == "text_encoder" else part.encoder.text_model
    known = inner(ids_of(part, "a photo of a cat")).pooler_output
    add_token(part, TOKEN, torch.randn(1, WIDTH), start=torch.zeros(1, WIDTH))
    assert torch.equal(inner(ids_of(part, "a photo of a cat")).pooler_output, known)
    ids = ids_of(part, f"{TOKEN} cat")
    output = inner(ids)
    end = ids[0].tolist().index(part.tokenizer.eos_token_id)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, end])


@pytest.mark.parametrize("token", ["cat", "Cat", "<|endoftext|>"])
def test_a_word_that_the_tokenizer_knows_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match=r"knows .* already"):
        NewToken(both(), config_of(placeholder_token=token))


@pytest.mark.parametrize("other", ["<hat>", "<hat>s", "<ha", "<hat>_1"])
def test_a_token_that_begins_like_another_is_refused(part: TextPart, other: str) -> None:
    rows = torch.zeros(2, WIDTH)
    add_token(part, "<hat>", rows, start=rows)
    with pytest.raises(AdapterError, match="knows"):
        add_token(part, other, rows, start=rows)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"initializer_token": "cat dog"}, "2 tokens for 1 embedding.* num_vectors to 2"),
        ({"initializer_token": "<|endoftext|>"}, "does not know"),
    ],
    ids=["too long", "no word"],
)
def test_an_initializer_that_cannot_be_one_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NewToken(both(), config_of(**keys))


def test_the_state_is_restored_exactly_and_another_is_refused() -> None:
    token, other = NewToken(both(), config_of(num_vectors=2)), NewToken(both(), config_of(num_vectors=2))
    for parameter in token.parameters():
        parameter.data.normal_()
    other.load_state_dict(token.state_dict())
    pairs = zip(token.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    with pytest.raises(AdapterError, match="does not fit"):
        NewToken(both(), config_of()).load_state_dict(token.state_dict())


def test_a_detached_token_leaves_the_encoders_own_embedding() -> None:
    parts = both()
    own = {name: part.encoder.get_input_embeddings() for name, part in parts.items()}
    token = NewToken(parts, config_of())
    token.detach()
    assert all(part.encoder.get_input_embeddings() is own[name] for name, part in parts.items())


def test_a_saved_token_is_attached_with_its_values_and_its_start(tmp_path: Path) -> None:
    trained = both()
    token = NewToken(trained, config_of(num_vectors=2))
    for parameter in token.parameters():
        parameter.data.normal_()
    file, prompt = tmp_path / "token.safetensors", f"a {TOKEN} {TOKEN}_1"
    header = {"placeholder_token": TOKEN, "initializer_token": "cat", "ss_output_name": "x"}
    token.save(file, metadata=header)
    stored = embeddings.read(file)
    for strength in (1.0, 0.5, 0.0):
        token.set_strength(strength)
        loaded = both()
        attach_embeddings(loaded, stored, strength=strength)
        for name, part in loaded.items():
            assert torch.equal(states_of(part, prompt), states_of(trained[name], prompt))


def test_embeddings_of_one_encoder_are_for_the_first_of_their_width() -> None:
    parts = both()
    stored = Embeddings(path=Path("a"), token=TOKEN, initializer=None, rows={"": torch.ones(1, WIDTH)})
    (added,) = attach_embeddings(parts, stored, strength=0.5)
    assert parts["text_encoder"].encoder.get_input_embeddings() is added
    found = added(ids_of(parts["text_encoder"], TOKEN))[0, 1]
    assert torch.equal(found, torch.ones(WIDTH)), "without an initializer the strength has no effect"


@pytest.mark.parametrize("name", ["", "text_encoder"], ids=["nameless", "named"])
def test_embeddings_of_another_model_are_refused(name: str) -> None:
    stored = Embeddings(path=Path("a"), token=TOKEN, initializer=None, rows={name: torch.ones(1, 7)})
    with pytest.raises(AdapterError, match=r"width 7.* 32.*another model"):
        attach_embeddings(both(), stored)


def test_embeddings_for_a_model_without_text_encoders_are_refused() -> None:
    stored = Embeddings(
        path=Path("a"), token=TOKEN, initializer=None, rows={"text_encoder": torch.ones(1, 7)}
    )
    with pytest.raises(AdapterError, match="no text encoder"):
        attach_embeddings({}, stored)
