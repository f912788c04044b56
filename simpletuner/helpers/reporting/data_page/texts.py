"""Captions as they are trained: what they lack, and the tags and words in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.caption_steps import tags_of
from simpletuner.helpers.data.caption_variants import CaptionPlan
from simpletuner.helpers.data.planned import PlannedImage

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_FEWEST_TAGS = 3
"""In half of the captions, before they are counted as tags: a sentence may have a comma too."""


@dataclass(frozen=True, slots=True)
class TextCounts:
    """In how many images' captions a tag or a word is."""

    noun: str
    """tag or word."""
    counts: tuple[tuple[str, int], ...]
    """The most frequent first."""
    num_captioned: int
    """Images with a caption."""
    longest: tuple[str, int] | None
    """The image with the longest caption, and its number of words."""
    median_words: int
    """In a caption."""


def texts_of(image: PlannedImage) -> tuple[str, ...]:
    """Every caption that an image is trained with, in each of its variants, each once."""
    instead = [each.captions for each in image.references]
    own = () if _has_others(image) else image.captions
    return tuple(dict.fromkeys(text for variants in (*own, *instead) for text in variants))


def _has_others(image: PlannedImage) -> bool:
    """Whether captions of its references stand for its own, whichever of them is drawn."""
    return bool(image.references) and all(each.captions for each in image.references)


def is_uncaptioned(image: PlannedImage, plan: CaptionPlan) -> bool:
    """Whether an image has no caption, or one of instance_prompt, prefix and suffix alone in their place."""
    config = plan.config
    if not any(texts_of(image)):
        return True
    if _has_others(image) or config.only_instance_prompt or config.caption_strategy == "instanceprompt":
        return False
    added = config.instance_prompt if config.prepend_instance_prompt else None
    if not (added or config.caption_prefix or config.caption_suffix):
        return False
    return image.captions == plan.variants(((added or "").strip(),), image=image.file.name)


def triggers_of(given: Sequence[str], config: DatasetConfig) -> tuple[str, ...]:
    """The texts of which each caption of a dataset should hold one: the ones given, else instance_prompt."""
    if given:
        return tuple(given)
    own = (config.instance_prompt or "").strip()
    return (own,) if own else ()


def holds(text: str, trigger: str) -> bool:
    """Whether a caption holds a trigger as whole words, in any case.

    Only Latin letters, digits and _ continue a word: Japanese has no blanks between words.
    """
    pattern = rf"(?<!\w){re.escape(trigger.casefold())}(?!\w)"
    return re.search(pattern, text.casefold(), re.ASCII) is not None


def count_texts(images: Iterable[PlannedImage], config: DatasetConfig) -> TextCounts:
    """Count the tags of a dataset's captions if most of them have several, else the words."""
    texts = {image.sample.path: texts_of(image) for image in images}
    captioned = {name: each for name, each in texts.items() if any(each)}
    tags = {name: _tags(each, config) for name, each in captioned.items()}
    several = sum(len(each) >= _FEWEST_TAGS for each in tags.values())
    has_tags = bool(captioned) and 2 * several >= len(captioned)
    words = {name: max((_words(text) for text in each), key=len) for name, each in captioned.items()}
    parts = tags if has_tags else {name: set(each) for name, each in words.items()}
    counts = Counter(part for each in parts.values() for part in each)
    lengths = {name: len(each) for name, each in words.items()}
    return TextCounts(
        noun="tag" if has_tags else "word",
        counts=tuple(sorted(counts.items(), key=lambda each: (-each[1], each[0]))),
        num_captioned=len(captioned),
        longest=max(lengths.items(), key=lambda each: each[1], default=None),
        median_words=sorted(lengths.values())[len(lengths) // 2] if lengths else 0,
    )


def _tags(texts: Iterable[str], config: DatasetConfig) -> set[str]:
    found = (tags_of(text, config.caption_shuffle) for text in texts)
    return {tag for each in found for tag in (*each.first, *each.free, *each.last)}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
