"""Changes of captions; choices/captions.py has the record of each, in the order in which they are taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from simpletuner.helpers.configuration.schema.captions import CaptionFilter, CaptionShuffle, caption_filter
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.sampler import shuffled as permutation
from simpletuner.helpers.randomness import mix

_RANGE = 1 << 63
_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_SEPARATORS = {
    "comma": (re.compile(r"\s*,\s*"), ", "),
    "space": (re.compile(r"\s+"), " "),
    "period": (re.compile(r"\s*\.(?:\s+|$)"), ". "),
}
"""Value of split_on -> what separates tags in a caption, and in a changed one."""


@dataclass(frozen=True, slots=True)
class CaptionDraw:
    """Source of randomness of one variant of a caption, or of one sample."""

    seed: int
    number: int
    """Of the variant, or of the sample."""
    caption: tuple[str | int, ...] = ()
    """Name of the image, and number of the caption among the image's; empty for a sample."""

    def value(self, purpose: str, *indices: int) -> int:
        """A number below 2^63 that depends on the arguments alone."""
        return mix(self.seed, purpose, *self.caption, self.number, *indices)

    def happens(self, probability: float, purpose: str, *indices: int) -> bool:
        """Whether something of this probability happens."""
        return self.value(purpose, *indices) < probability * _RANGE


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of a caption."""

    first: tuple[str, ...]
    """They stay in place."""
    free: tuple[str, ...]
    last: tuple[str, ...] = ()
    """They stay in place."""

    def __len__(self) -> int:
        return len(self.first) + len(self.free) + len(self.last)


def tags_of(caption: str, shuffle: CaptionShuffle) -> Tags:
    """The tags of a caption, without empty ones."""
    pattern, _ = _SEPARATORS[shuffle.split_on]

    def split(text: str) -> tuple[str, ...]:
        return tuple(tag for part in pattern.split(text) if (tag := part.strip()))

    separator = shuffle.keep_separator
    if separator is not None and separator in caption:
        parts = caption.split(separator, 2)
        return Tags(*map(split, parts))
    tags = split(caption)
    return Tags(tags[: shuffle.position_start], tags[shuffle.position_start :])


def filtered(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption after each entry of caption_filter_list, in their order."""
    del draw
    for each in _filters(dataset.caption_filter_list):
        caption = each.apply(caption)
    return caption


def prefixed(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption after caption_prefix and a blank."""
    del draw
    return f"{dataset.caption_prefix.strip()} {caption}".strip()


def suffixed(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption before a blank and caption_suffix."""
    del draw
    return f"{caption} {dataset.caption_suffix.strip()}".strip()


def wildcards_drawn(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption with one of the alternatives in place of each {a|b}, and braces in place of double ones."""
    del dataset
    place = -1

    def chosen(match: re.Match[str]) -> str:
        nonlocal place
        if match[1] is None:
            return match[0][0]
        place += 1
        options = match[1].split("|")
        return options[draw.value("caption wildcard", place) % len(options)].strip()

    return re.sub(r"  +", " ", _WILDCARD.sub(chosen, caption)).strip()


def tags_dropped(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption without some of the tags that are not kept in place; keep_separator stays."""
    shuffle, rate = dataset.caption_shuffle, dataset.caption_tag_dropout_rate
    tags = tags_of(caption, shuffle)
    kept = tuple(
        tag for place, tag in enumerate(tags.free) if not draw.happens(rate, "caption tag dropout", place)
    )
    if len(kept) == len(tags.free):
        return caption
    separator = shuffle.keep_separator
    if separator is None or separator not in caption:
        return _joined((*tags.first, *kept), caption, shuffle)
    groups = (tags.first, kept, tags.last)[: caption.count(separator) + 1]
    return f" {separator} ".join(_joined(group, caption, shuffle) for group in groups)


def shuffled(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption with its tags in the order of this variant, without keep_separator.

    The first order is the caption's own with include_original.
    """
    shuffle = dataset.caption_shuffle
    order, tags = draw.number % shuffle.num_orders, tags_of(caption, shuffle)
    if not shuffle.enable or (shuffle.include_original and order == 0):
        if shuffle.keep_separator is None or shuffle.keep_separator not in caption:
            return caption
        return _joined((*tags.first, *tags.free, *tags.last), caption, shuffle)
    seed = draw.seed if shuffle.seed is None else shuffle.seed
    purpose = "\x1f".join(["caption order", *map(str, draw.caption)])
    places = permutation(seed, purpose, order, length=len(tags.free))
    free = tuple(tags.free[place] for place in places)
    return _joined((*tags.first, *free, *tags.last), caption, shuffle)


def caption_dropped(caption: str, dataset: DatasetConfig, draw: CaptionDraw) -> str:
    """The caption, or none for the sample."""
    rate = dataset.caption_dropout_probability
    return "" if rate is not None and draw.happens(rate, "caption dropout") else caption


def _joined(tags: Sequence[str], caption: str, shuffle: CaptionShuffle) -> str:
    """The tags as a caption that ends as it did."""
    text = _SEPARATORS[shuffle.split_on][1].join(tags)
    return f"{text}." if text and shuffle.split_on == "period" and caption.rstrip().endswith(".") else text


@lru_cache(maxsize=8)
def _filters(entries: tuple[str, ...]) -> tuple[CaptionFilter, ...]:
    return tuple(map(caption_filter, entries))
