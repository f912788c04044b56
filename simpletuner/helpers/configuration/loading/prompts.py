"""Validation prompts: the one in config.json, the built-in library and the user's library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.schema.sections import ValidationPrompt
from simpletuner.helpers.configuration.text.problems import unknown_key

LIBRARY: Mapping[str, str] = {
    "portrait": "a close portrait of an old fisherman with a grey beard, soft window light, 85 mm photograph",
    "landscape": "a wide valley at dawn, mist over a river, snowy mountains behind, landscape photograph",
    "city": "a rainy street in a big city at night, neon signs mirrored in puddles, people with umbrellas",
    "animal": "a red fox standing in fresh snow, looking at the camera, wildlife photograph",
    "still-life": "a bowl of ripe peaches and a glass of water on a wooden table, oil painting",
    "interior": "a sunlit reading room with tall bookshelves, a green armchair and a round window",
    "illustration": "a small house on a hill under a giant moon, flat colours, children's book illustration",
    "text": 'a wooden sign on a garden gate that says "welcome home"',
}
"""Built-in prompts: people, places, animals, things, styles, lettering."""

_KEYS = ("prompt", "adapter_strength")


def merge_prompts(
    prompt: str | None, *, with_library: bool, user: Iterable[ValidationPrompt]
) -> tuple[ValidationPrompt, ...]:
    """Every validation prompt; the user's replaces one of the same name."""
    every = [ValidationPrompt(name="validation", text=prompt)] if prompt is not None else []
    if with_library:
        every += [ValidationPrompt(name=name, text=text) for name, text in LIBRARY.items()]
    return tuple({each.name: each for each in (*every, *user)}.values())


def at_both_ends(
    prompts: Iterable[ValidationPrompt], strengths: Sequence[float], *, factor: float
) -> tuple[ValidationPrompt, ...]:
    """The prompts, each without a strength of its own at the lowest and the highest of a slider.

    Args:
        prompts: The prompts.
        strengths: The slider's, ascending; empty without a slider.
        factor: Multiplies them.
    """
    ends = tuple(dict.fromkeys((strengths[0], strengths[-1]))) if strengths else ()
    return tuple(
        each
        for prompt in prompts
        for each in (
            [prompt.model_copy(update={"strength": end * factor}) for end in ends]
            if ends and prompt.strength is None
            else [prompt]
        )
    )


def read_library(values: JsonValue, source: Source) -> tuple[ValidationPrompt, ...]:
    """Check user_prompt_library; leaves out invalid entries and notes every problem."""
    if not isinstance(values, dict):
        source.add("", "must hold an object of name and prompt, {...}.")
        return ()
    if not values:
        source.add("", "is empty. Add a prompt, or remove user_prompt_library.")
    prompts = [_prompt(name, value, source) for name, value in values.items()]
    return tuple(prompt for prompt in prompts if prompt is not None)


def _prompt(name: str, value: JsonValue, source: Source) -> ValidationPrompt | None:
    entry = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        source.reject(name, value, f"must be a prompt, or an object with {' and '.join(_KEYS)}.")
        return None
    for key in entry:
        if key not in _KEYS:
            source.add(f"{name}.{key}", unknown_key(key, _KEYS))
    text, strength = entry.get("prompt"), entry.get("adapter_strength")
    if not isinstance(text, str) or not text.strip():
        source.reject(f"{name}.prompt", text, "must be a text, not empty.")
        return None
    try:
        number = None if strength is None else float(str(strength))
    except ValueError:
        number = None
    if strength is not None and (number is None or not math.isfinite(number)):
        source.reject(f"{name}.adapter_strength", strength, "must be a number.")
        return None
    return ValidationPrompt(name=name, text=text, strength=number)
