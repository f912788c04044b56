"""Embeds of prompts at several strengths of what is attached to the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from simpletuner.helpers.sampling.attached import InText, encode


class Family:
    """Encodes a prompt to its text and the strength of its one adapter."""

    def __init__(self) -> None:
        self.strength = 1.0
        self.num_calls = 0

    def set_strength(self, strength: float) -> None:
        self.strength = strength

    def encode_prompts(self, prompts: Sequence[str]) -> list[tuple[str, float]]:
        self.num_calls += 1
        return [(prompt, self.strength) for prompt in prompts]


def test_prompts_are_encoded_at_each_strength_of_an_adapter() -> None:
    family = Family()
    in_text = InText({"text_encoder": cast(Any, family)})
    embeds = encode(cast(Any, family), in_text, ["b", "a"], strengths=[0.5, 1.0])
    assert embeds == {strength: {text: (text, strength) for text in "ab"} for strength in (0.5, 1.0)}


def test_prompts_are_encoded_once_without_one() -> None:
    family = Family()
    embeds = encode(cast(Any, family), InText(), ["a"], strengths=[0.5, 1.0])
    assert embeds[0.5] == embeds[1.0] == {"a": ("a", 1.0)}
    assert family.num_calls == 1
