"""The prompts of validations: one from config.json, those of the trainer, those of a user's json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source
from simpletuner.helpers.configuration.schema.sections import ValidationPrompt
from simpletuner.helpers.configuration.text.problems import nearest

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
"""Prompts that come with the trainer: people, places, animals, things, styles, lettering."""

_KEYS = ("prompt", "adapter_strength")


def prompts_of(
    prompt: str | None, *, with_library: bool, user: Iterable[ValidationPrompt]
) -> tuple[ValidationPrompt, ...]:
    """Every prompt of a validation; of two with one name, the user's own counts."""
    every = [ValidationPrompt(name="validation", text=prompt)] if prompt is not None else []
    if with_library:
        every += [ValidationPrompt(name=name, text=text) for name, text in LIBRARY.items()]
    return tuple({each.name: each for each in (*every, *user)}.values())


def read_library(values: JsonValue, source: Source) -> tuple[ValidationPrompt, ...]:
    """The prompts of a user's json; every problem is noted."""
    if not isinstance(values, dict):
        source.add("", "must hold an object of name and prompt, {...}.")
        return ()
    if not values:
        source.add("", "holds no prompt. Add one, or remove user_prompt_library.")
    prompts = [_prompt(name, value, source) for name, value in values.items()]
    return tuple(prompt for prompt in prompts if prompt is not None)


def _prompt(name: str, value: JsonValue, source: Source) -> ValidationPrompt | None:
    entry = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        source.add(
            name,
            f"{source.problems.shown(value)}: must be a prompt, or an object with {' and '.join(_KEYS)}.",
        )
        return None
    for key in entry.keys() - set(_KEYS):
        source.add(f"{name}.{key}", f"unknown key.{nearest(key, _KEYS)}")
    text, strength = entry.get("prompt"), entry.get("adapter_strength")
    if not isinstance(text, str) or not text.strip():
        source.add(f"{name}.prompt", f"{source.problems.shown(text)}: must be a text that is not empty.")
        return None
    try:
        right = None if strength is None or isinstance(strength, bool) else float(str(strength))
    except ValueError:
        right = None
    if strength is not None and (right is None or abs(right) == float("inf") or right != right):
        source.add(f"{name}.adapter_strength", f"{source.problems.shown(strength)}: must be a number.")
        return None
    return ValidationPrompt(name=name, text=text, strength=right)
