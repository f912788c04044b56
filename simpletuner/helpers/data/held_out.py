"""Held-out images: never trained, only evaluated. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.planned import DatasetPlan, PlannedImage, PlannedImages
from simpletuner.helpers.data.references import PlannedReference
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import counted

logger = logging.getLogger(__name__)

_NUM_DIGESTS = 1 << 128
ADVICE = "Raise it, or move images into an entry with dataset_type eval."


@dataclass(frozen=True)
class Divided:
    """The images of a run's datasets: what is trained, and what is held out."""

    trained: tuple[DatasetPlan, ...]
    """The plans without held-out images; none is empty."""
    held_parts: tuple[PlannedImages, ...]
    """The held-out images of each dataset that has some."""

    @cached_property
    def held_out(self) -> tuple[PlannedImage, ...]:
        """The held-out images, in the order of the datasets and of their names."""
        return tuple(image for images in self.held_parts for image in images)

    @property
    def parts(self) -> tuple[PlannedImages, ...]:
        """The trained images of each dataset, then the held-out ones."""
        return (*(plan.images for plan in self.trained), *self.held_parts)

    def trained_captions(self) -> list[str]:
        """Every variant of the captions that are trained once, with those of references."""
        images = [plan.images for plan in self.trained]
        own = [text for each in images for text in each.captions.all()]
        references = [reference for each in images for reference in each.all_references()]
        return list(dict.fromkeys([*own, *(text for each in references for text in each.captions)]))

    def references(self) -> list[PlannedReference]:
        """The references of all images, in their order."""
        return [each for images in self.parts for each in images.all_references()]


def is_held_out(config: DatasetConfig, digest: str) -> bool:
    """Whether an image of a dataset is held out, by the digest of its bytes: 32 hexadecimal digits.

    It depends on the image alone, so other images, names and the order of files change nothing.
    """
    return not config.is_trained or int(digest, 16) < config.eval_share * _NUM_DIGESTS


def divided(plans: Sequence[DatasetPlan]) -> Divided:
    """Hold out the images of entries with dataset_type eval, and eval_share of those of others.

    An image whose bytes are held out in one dataset is trained in none; it is logged where that is left out.

    Raises:
        DataError: Nothing of a dataset is left to train.
    """
    held_out = {plan.config.id: _held_out(plan) for plan in plans}
    digests = {digest for images in held_out.values() for digest in _hex_digests(images)}
    trained = {plan.config.id: _trained(plan, digests) for plan in plans if plan.config.is_trained}
    for plan in plans:
        _log(plan, num_held_out=len(held_out[plan.config.id]))
        if plan.config.is_trained:
            _log_twins(plan, trained[plan.config.id])
    return Divided(tuple(trained.values()), tuple(images for images in held_out.values() if len(images)))


def _held_out(plan: DatasetPlan) -> PlannedImages:
    rows = enumerate(_hex_digests(plan.images) if plan.config.holds_out else ())
    return plan.images.take(np.array([row for row, each in rows if is_held_out(plan.config, each)], np.int64))


def _hex_digests(images: PlannedImages) -> Iterator[str]:
    return (digest.tobytes().hex() for digest in images.digests)


def chosen_to_evaluate(
    data: Divided, *, most: int, dataset_ids: Collection[str] = ()
) -> tuple[list[PlannedImage], list[PlannedImage]]:
    """The held-out images that are evaluated, and training images to compare them with.

    Those with the lowest digests, so that new images change little. The training images are of the datasets
    with an eval_share, else of all that teach something; they are no more than the held-out ones.

    Args:
        data: The images of the run.
        most: Of each.
        dataset_ids: The datasets whose held-out images count; empty for all.
    """
    held_out = [each for each in data.held_out if not dataset_ids or each.sample.dataset_id in dataset_ids]
    subjects = [plan for plan in data.trained if not plan.config.is_regularisation_data]
    sharing = [plan for plan in subjects if plan.config.holds_out] or subjects
    first = _by_digest(held_out)[:most]
    return first, _by_digest([image for plan in sharing for image in plan.images])[: len(first)]


def _by_digest(images: Sequence[PlannedImage]) -> list[PlannedImage]:
    return sorted(images, key=lambda image: (image.digest, image.sample.dataset_id, image.sample.path))


def _trained(plan: DatasetPlan, digests: Collection[str]) -> DatasetPlan:
    """The plan without the images whose digests are held out."""
    if not digests:
        return plan
    rows = [row for row, digest in enumerate(_hex_digests(plan.images)) if digest not in digests]
    if rows:
        return replace(plan, images=plan.images.take(np.array(rows, np.int64)))
    raise DataError(all_held_out(plan.config, len(plan.images)))


def all_held_out(config: DatasetConfig, number: int) -> str:
    """What to do about a dataset whose images, or the same ones in another dataset, are all held out."""
    images, share = counted(number, "image is", "images are"), config.eval_share
    cause = f"eval_share {share:g}" if share else "another dataset holds out the same bytes"
    remedy = "Lower eval_share, or add images" if share else "Remove the images from one of the two"
    return f"Dataset {config.id!r}: its {images} held out ({cause}), so none is trained. {remedy}."


def _log(plan: DatasetPlan, *, num_held_out: int) -> None:
    config, number = plan.config, len(plan.images)
    if num_held_out:
        logger.info("Dataset %s: %d of %s held out.", config.id, num_held_out, counted(number, "image"))
    elif config.eval_share:
        logger.warning("%s", without_any(config, number))


def without_any(config: DatasetConfig, number: int) -> str:
    """What to do about a dataset whose eval_share holds out none of its images."""
    images = counted(number, "image")
    return f"Dataset {config.id}: eval_share {config.eval_share:g} holds out none of its {images}. {ADVICE}"


def _log_twins(plan: DatasetPlan, kept: DatasetPlan) -> None:
    """Name the images that are left out because another dataset holds out the same ones."""
    if len(kept.images) == len(plan.images):
        return
    names = {image.sample.path for image in kept.images}
    twins = [
        image.sample.path
        for image in plan.images
        if image.sample.path not in names and not is_held_out(plan.config, image.digest)
    ]
    if twins:
        logger.warning(
            "Dataset %s: %s not trained, because another dataset holds out the same bytes: %s.",
            plan.config.id,
            counted(len(twins), "image is", "images are"),
            listed(twins),
        )
