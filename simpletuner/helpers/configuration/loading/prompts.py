"""Validation prompts: the one in config.json, the built-in library and the user's library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source, Validated, build
from simpletuner.helpers.configuration.schema.base import InputFiles, Section
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.sections import ValidationPrompt
from simpletuner.helpers.configuration.text.problems import unknown_key
from simpletuner.helpers.configuration.text.reading import read_json, read_text
from simpletuner.helpers.contracts import ModelSpec

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

_KEYS = ("prompt", "adapter_strength", "image")


class _Images(Section):
    """The reference images of a prompt."""

    image: InputFiles


def merge_prompts(
    prompt: str | None,
    *,
    with_library: bool,
    images: tuple[Path, ...],
    user: Iterable[ValidationPrompt],
) -> tuple[ValidationPrompt, ...]:
    """Every validation prompt; the user's replaces one of the same name, and has its own reference images."""
    texts = ({} if prompt is None else {"validation": prompt}) | (dict(LIBRARY) if with_library else {})
    every = [ValidationPrompt(name=name, text=text, images=images) for name, text in texts.items()]
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


def check_images(
    prompts: Sequence[ValidationPrompt],
    model: Validated[ModelConfig],
    *,
    images: Sequence[Path],
    spec: ModelSpec,
    source: Source,
) -> None:
    """Check that the model takes the reference images of prompts; `images` are those that they share."""
    section = model.if_valid("model_flavour", "pretrained_model_name_or_path")
    if section is None or not any(each.images for each in prompts):
        return
    if not spec.sees_references(section.model_flavour, section.pretrained_model_name_or_path):
        key = "validation_reference_images" if images else "user_prompt_library"
        name = f"{spec.name} {section.model_flavour or spec.default_flavour}"
        allowed = ", ".join(each for each in spec.flavours if each in spec.reference_flavours)
        advice = f"Remove them, or set model_flavour to {allowed}." if allowed else "Remove them."
        source.add(key, f"{name} takes no reference images. {advice}")


def read_library(
    values: JsonValue, source: Source, *, images: tuple[Path, ...]
) -> tuple[ValidationPrompt, ...]:
    """Check user_prompt_library; leaves out invalid entries and notes every problem.

    `images` are the reference images of prompts that name none.
    """
    if not isinstance(values, dict):
        source.add("", "must hold an object of name and prompt, {...}.")
        return ()
    if not values:
        source.add("", "is empty. Add a prompt, or remove user_prompt_library.")
    prompts = [_prompt(name, value, source, images=images) for name, value in values.items()]
    return tuple(prompt for prompt in prompts if prompt is not None)


def read_prompts(file: Path, source: Source, *, images: tuple[Path, ...]) -> tuple[ValidationPrompt, ...]:
    """The prompts of a file: a json as for user_prompt_library, else one on each line; notes every problem.

    `images` are the reference images of prompts that name none.
    """
    own, problems = replace(source, name_of=lambda _: str(file)), source.problems
    if file.suffix.lower() == ".json":
        values = read_json(file, source=str(file), problems=problems)
        return () if values is None else read_library(values, own, images=images)
    text = read_text(file, source=str(file), problems=problems)
    if text is None:
        return ()
    lines = [line for each in text.splitlines() if (line := each.strip())]
    if not lines:
        own.add("", "has no prompt. Write one on each line.")
    return tuple(ValidationPrompt(name=line, text=line, images=images) for line in lines)


def _prompt(
    name: str, value: JsonValue, source: Source, *, images: tuple[Path, ...]
) -> ValidationPrompt | None:
    entry = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        source.reject(name, value, f"must be a prompt, or an object with {', '.join(_KEYS)}.")
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
    if "image" in entry:
        own = build(_Images, {"image": entry["image"]}, replace(source, prefix=f"{name}."))
        images = () if own.section is None else own.section.image
    return ValidationPrompt(name=name, text=text, strength=number, images=images)
