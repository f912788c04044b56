"""Sample prompts of another program as validation prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft

_OPTION = re.compile(r"\s--(?=[a-z_]+(?:\s|$))", re.IGNORECASE)
_NAMES = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance",
    "g": "guidance",
    "n": "negative",
    "ss": "sampler",
    "ctrl_img": "control",
    "cn": "control",
    "m": "strength",
}
"""Flag behind a prompt -> what it sets."""


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """One prompt with its own settings."""

    text: str
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    """width, height, seed, steps, guidance, negative, sampler, strength, control."""
    images: tuple[str, ...] = ()
    """Paths of its reference images."""


def prompt_of_line(line: str) -> SamplePrompt:
    """A prompt with flags behind it, such as "a cat --w 832 --h 1216 --d 1 --l 7 --s 28 --n blurry"."""
    text, *flags = _OPTION.split(line.strip())
    options: dict[str, JsonValue] = {}
    for flag in flags:
        name, _, value = flag.partition(" ")
        options[_NAMES.get(name.lower(), name.lower())] = value.strip()
    return SamplePrompt(text.strip(), options)


def prompts_of_text(text: str) -> list[SamplePrompt]:
    """The prompts of a text file, one on each line; lines that begin with # are comments."""
    lines = (line.strip() for line in text.splitlines())
    return [prompt_of_line(line) for line in lines if line and not line.startswith("#")]


def put_prompts(draft: Draft, prompts: Sequence[SamplePrompt], *, guidance_key: str) -> str:
    """Write the prompts and the settings of the first one; returns what differs, as a sentence.

    Args:
        draft: Gets them.
        prompts: At least one.
        guidance_key: Our key of the guidance scale.
    """
    given = list(dict.fromkeys((prompt.text, prompt.images) for prompt in prompts if prompt.text))
    if len(given) == 1:
        text, images = given[0]
        draft.config["validation_prompt"] = text
        if images:
            draft.config["validation_reference_images"] = _one_or_all(images)
    else:
        width = len(str(len(given)))
        draft.prompts.update(
            {
                f"prompt_{index:0{width}}": {"prompt": text, "image": _one_or_all(images)} if images else text
                for index, (text, images) in enumerate(given, 1)
            }
        )
    first = prompts[0].options
    if "width" in first or "height" in first:
        width_px, height_px = first.get("width", first.get("height")), first.get("height", first.get("width"))
        draft.config["validation_resolution"] = f"{width_px}x{height_px}"
    _put(draft, "validation_seed", first.get("seed"), kind=int)
    _put(draft, "validation_num_inference_steps", first.get("steps"), kind=int)
    _put(draft, guidance_key, first.get("guidance"), kind=float)
    _put(draft, "validation_lycoris_strength", first.get("strength"), kind=float)
    negative = first.get("negative")
    if isinstance(negative, str) and negative:
        draft.config["validation_negative_prompt"] = negative
    return _differences(prompts)


def _one_or_all(images: Sequence[str]) -> JsonValue:
    return images[0] if len(images) == 1 else list(images)


def _put(draft: Draft, key: str, value: JsonValue, *, kind: type[int] | type[float]) -> None:
    try:
        read = kind(str(value))
    except ValueError:
        return
    if kind is float or read >= 0:
        draft.config[key] = read


def _differences(prompts: Sequence[SamplePrompt]) -> str:
    values: dict[str, set[str]] = {}
    for prompt in prompts:
        for name, value in prompt.options.items():
            if name == "control":
                continue
            values.setdefault(name, set()).add(str(value))
    differing = sorted(name for name, found in values.items() if len(found) > 1)
    found = (
        f"All prompts share the first one's settings; they differ in {', '.join(differing)}."
        if differing
        else ""
    )
    is_left_out = any("control" in prompt.options and not prompt.images for prompt in prompts)
    control = " Source images of prompts are left out." if is_left_out else ""
    return (found + control).strip()
