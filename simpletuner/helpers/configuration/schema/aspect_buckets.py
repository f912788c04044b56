"""The aspect ratios that crops are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated

from pydantic import BeforeValidator

from simpletuner.helpers.configuration.schema.base import Section

LARGEST_ASPECT = 32
_ROUNDING = 1e-6


class AspectBucket(Section):
    """An aspect ratio of crops, with its share of the random draws."""

    aspect: float
    """Width / height."""
    weight: float
    """Share of the draws with crop_aspect random; the weights of all buckets sum to 1."""


def _aspect_buckets(value: object) -> object:
    """Numbers, or objects of an aspect and a weight, from numbers or texts.

    Raises:
        ValueError: An entry is neither, or the weights do not sum to 1.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError("must be a list of width / height, for instance [0.67, 1.0, 1.5].")
    buckets = [_bucket(each) for each in value]
    weighted = [each for each in buckets if isinstance(each, AspectBucket)]
    if weighted and len(weighted) < len(buckets):
        raise ValueError("mixes numbers and objects. Give all of them a weight, or none.")
    total = sum(each.weight for each in weighted)
    if weighted and not math.isclose(total, 1, abs_tol=_ROUNDING):
        raise ValueError(f"the weights sum to {total:g}. They must sum to 1.")
    return tuple(buckets)


def _bucket(value: object) -> float | AspectBucket:
    if isinstance(value, AspectBucket):
        return value
    if not isinstance(value, Mapping):
        return _aspect(value)
    if value.keys() != {"aspect", "weight"}:
        raise ValueError('an object must have the keys aspect and weight, {"aspect": 1.5, "weight": 0.25}.')
    weight = _finite(value["weight"])
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight:g}: must be from 0 to 1.")
    return AspectBucket(aspect=_aspect(value["aspect"]), weight=weight)


def _aspect(value: object) -> float:
    aspect = _finite(value)
    if not 1 / LARGEST_ASPECT <= aspect <= LARGEST_ASPECT:
        raise ValueError(f"{aspect:g}: must be width / height, from 1/32 to 32.")
    return aspect


def _finite(value: object) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            number = float(value)
    if not math.isfinite(number):
        raise ValueError("entries must be numbers, or objects of two numbers.")
    return number


AspectBuckets = Annotated[tuple[float | AspectBucket, ...], BeforeValidator(_aspect_buckets)]
