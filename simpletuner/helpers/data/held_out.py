"""Held-out images: never trained, only evaluated. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.planning import DatasetPlan, PlannedImage
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io.names import counted

logger = logging.getLogger(__name__)

_NUM_DIGESTS = 1 << 128
ADVICE = "Raise it, or move images into an entry with dataset_type eval."


@dataclass(frozen=True, slots=True)
class Divided:
    """The images of a run's datasets: what is trained, and what is held out."""

    trained: tuple[DatasetPlan, ...]
    """The plans without held-out images; none is empty."""
    held_out: tuple[PlannedImage, ...]
    """In the order of the datasets and of their names."""


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
    held_out = {
        plan.config.id: [each for each in plan.images if is_held_out(plan.config, each.digest)]
        for plan in plans
    }
    digests = {image.digest for images in held_out.values() for image in images}
    trained = {plan.config.id: _trained(plan, digests) for plan in plans if plan.config.is_trained}
    for plan in plans:
        _log(plan, num_held_out=len(held_out[plan.config.id]))
        if plan.config.is_trained:
            _log_twins(plan, trained[plan.config.id])
    return Divided(tuple(trained.values()), tuple(image for images in held_out.values() for image in images))


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
    kept = tuple(image for image in plan.images if image.digest not in digests)
    if kept:
        return replace(plan, images=kept)
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
