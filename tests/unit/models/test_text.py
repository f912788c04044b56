"""Captions in scripts that a text encoder does not read are noticed once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from transformers import CLIPTokenizer

from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.flux.tiny import make_t5_tokenizer
from simpletuner.helpers.models.text import ScriptWarning
from simpletuner.helpers.models.tiny_parts import (
    byte_alphabet,
    learn_merges,
    make_clip_tokenizer,
    make_vocabulary,
)

JAPANESE = "猫の写真"


@pytest.mark.parametrize(
    ("tokenizer", "lost"),
    [(make_clip_tokenizer(pad="!"), "12 of its 12 tokens"), (make_t5_tokenizer(), "1 of its 2 tokens")],
    ids=["bytes of CLIP", "unknown to T5"],
)
def test_a_caption_that_is_not_read_is_told_once_with_the_caption(
    caplog: pytest.LogCaptureFixture, tokenizer: object, lost: str
) -> None:
    warning = ScriptWarning(encoder="the encoder")
    with caplog.at_level(logging.WARNING):
        warning.check(["a photo of a cat"], tokenizer)
        assert not caplog.records
        warning.check(["a cat", JAPANESE], tokenizer)
        warning.check([JAPANESE + JAPANESE], tokenizer)
    (record,) = caplog.records
    assert lost in record.getMessage()
    assert repr(JAPANESE) in record.getMessage()


def test_a_character_beyond_ascii_that_has_a_token_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    # CLIP's vocabulary has é; its bytes as CLIP writes them.
    merges = learn_merges(["café".encode().decode("latin-1")], end_of_word="</w>")
    symbols = [*byte_alphabet(), *(f"{symbol}</w>" for symbol in byte_alphabet())]
    vocabulary = make_vocabulary(symbols, merges=merges, special=("<|startoftext|>", "<|endoftext|>"))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(merges))
    warning = ScriptWarning(encoder="CLIP")
    with caplog.at_level(logging.WARNING):
        warning.check(["café"], tokenizer)
        assert not caplog.records
        warning.check(["thé"], tokenizer)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("name", "encoder"), [("sdxl", "CLIP"), ("flux", "T5")])
def test_a_family_tells_of_such_captions(
    make: Callable[..., ModelFamily], caplog: pytest.LogCaptureFixture, name: str, encoder: str
) -> None:
    family = make(name)
    family.load_text_encoders()
    with caplog.at_level(logging.WARNING):
        family.encode_prompts(["a cat", JAPANESE])
    assert any(f"{encoder} has no token for" in each.getMessage() for each in caplog.records)
