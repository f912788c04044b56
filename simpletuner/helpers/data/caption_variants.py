"""The texts that a dataset's captions become, and their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from simpletuner.helpers.choices.captions import CAPTION_STEPS, CaptionStep
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.sections import DataConfig
from simpletuner.helpers.data.caption_steps import CaptionDraw, tags_of
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.io.names import counted, printable

MAX_VARIANTS = 100_000
"""Of all captions, if they have several: each is encoded before training."""

Step = Callable[[str, DatasetConfig, CaptionDraw], str]


def limit_problem(numbers: Mapping[str, int]) -> str | None:
    """The error message for more variants than can be made before training.

    Args:
        numbers: Dataset -> number of the variants of all its captions, of datasets that have several.
    """
    total = sum(numbers.values())
    if total <= MAX_VARIANTS:
        return None
    parts = " and ".join(f"{number:,} of dataset {name!r}" for name, number in numbers.items())
    return (
        f"{total:,} variants of captions ({parts}) are more than {MAX_VARIANTS:,}, and each is made before "
        "training, also with text_cache_ondemand. Lower caption_variants, count of caption_shuffle or "
        "max_num_samples."
    )


@dataclass(frozen=True, slots=True)
class TagProblems:
    """Captions of a dataset that caption_shuffle and caption_tag_dropout_rate leave as they are."""

    config: DatasetConfig
    num_captions: int
    """That were looked at and hold a word."""
    unsplit: tuple[str, ...]
    """Images whose caption lacks the separator."""
    kept: tuple[str, ...]
    """Images all of whose tags stay in place."""

    @property
    def is_error(self) -> bool:
        """Whether no caption is changed."""
        return 0 < self.num_captions == len(self.unsplit) + len(self.kept)

    def lines(self) -> Iterator[str]:
        """A sentence for each kind."""
        shuffle = self.config.caption_shuffle
        if self.unsplit:
            yield (
                f"caption_shuffle.split_on is {shuffle.split_on}, and {self._share(self.unsplit)} no tags so "
                f"separated: {listed(self.unsplit)}. Change split_on, or remove caption_shuffle"
            )
        if self.kept:
            key = "position_start" if shuffle.keep_separator is None else "position_start or keep_separator"
            yield (
                f"caption_shuffle.{key} keeps every tag in place, as {self._share(self.kept)} no more than "
                f"these: {listed(self.kept)}. Lower it"
            )

    def _share(self, names: Sequence[str]) -> str:
        has = "has" if len(names) == 1 else "have"
        return f"{len(names):,} of {counted(self.num_captions, 'caption')} {has}"


@dataclass(frozen=True, slots=True)
class CaptionPlan:
    """What a dataset does with its captions."""

    config: DatasetConfig
    """With the rate of caption dropout."""
    seed: int
    caption_variants: int
    """The run's."""

    @property
    def num_variants(self) -> int:
        """Texts of each caption; a multiple of the orders of caption_shuffle, so that all are as frequent."""
        orders = self.config.caption_shuffle.num_orders
        if not any(step.varies == "by variant" for step in self._steps()):
            return orders
        return orders * -(-self.caption_variants // orders)

    @property
    def changes(self) -> bool:
        """Whether captions are changed before training."""
        return any(step.varies != "by sample" for step in self._steps())

    def variants(self, texts: Sequence[str], *, image: str) -> tuple[tuple[str, ...], ...]:
        """The variants of each caption of an image.

        They depend on the seed, the image's name, the number of the caption and that of the variant alone.

        Args:
            texts: The captions.
            image: Name of the image, relative to the dataset's folder.
        """
        steps: list[Step] = [each.load() for each in self._steps() if each.varies != "by sample"]
        if not steps:
            return tuple((text,) for text in texts)
        return tuple(
            tuple(
                self._changed(text, steps, CaptionDraw(self.seed, number, (image, place)))
                for number in range(self.num_variants)
            )
            for place, text in enumerate(texts)
        )

    def of_sample(self, caption: str, sample_index: int) -> str:
        """The caption of one sample, after the steps that are drawn each time."""
        steps: list[Step] = [each.load() for each in self._steps() if each.varies == "by sample"]
        return self._changed(caption, steps, CaptionDraw(self.seed, sample_index))

    def tag_problems(self, captions: Iterable[tuple[str, str]]) -> TagProblems:
        """The captions whose tags caption_shuffle and tag dropout leave as they are.

        Args:
            captions: Name of each image and one of its captions.
        """
        shuffle, unsplit, kept = self.config.caption_shuffle, [], []
        num_captions = 0
        if shuffle.enable or self.config.caption_tag_dropout_rate:
            fixed: list[Step] = [each.load() for each in self._steps() if each.varies == "never"]
            for name, caption in captions:
                text = self._changed(caption, fixed, CaptionDraw(self.seed, 0, (name, 0)))
                tags = tags_of(text, shuffle)
                num_captions += bool(text)
                if text and len(tags) == 1 and shuffle.enable:
                    unsplit.append(printable(name))
                elif text and not tags.free:
                    kept.append(printable(name))
        return TagProblems(self.config, num_captions, tuple(unsplit), tuple(kept))

    def _steps(self) -> Iterator[CaptionStep]:
        return (each for each in CAPTION_STEPS.values() if getattr(self.config, each.switch))

    def _changed(self, caption: str, steps: Sequence[Step], draw: CaptionDraw) -> str:
        for step in steps:
            caption = step(caption, self.config, draw)
        return caption


def caption_plan(
    config: DatasetConfig, data: DataConfig, *, seed: int, caption_dropout: float
) -> CaptionPlan:
    """What a dataset does with its captions.

    Args:
        config: The dataset.
        data: The run's defaults.
        seed: The run's.
        caption_dropout: Share of draws without a caption, unless the dataset sets one.
    """
    own = config.caption_dropout_probability
    rate = caption_dropout if own is None else own
    return CaptionPlan(
        config.model_copy(update={"caption_dropout_probability": rate}), seed, data.caption_variants
    )
