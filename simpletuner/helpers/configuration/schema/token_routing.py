"""Token routing (TREAD): blocks of a transformer that train on a part of the image tokens."""

from __future__ import annotations

import json
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from simpletuner.helpers.configuration.schema.base import Section, Whole, contradiction, none_word


class Route(Section):
    """Blocks that a share of the image tokens passes by."""

    selection_ratio: Annotated[float, Field(gt=0, lt=1)]
    """Share of the image tokens that passes the blocks by."""
    start_layer_idx: Whole
    """First of these blocks, counted from 0 over all blocks of the transformer; -1 is the last one."""
    end_layer_idx: Whole
    """Last of these blocks, counted in the same way."""

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Self:
        start, end = self.start_layer_idx, self.end_layer_idx
        if (start < 0) == (end < 0) and start > end:
            raise contradiction("start_layer_idx", f"{start} comes after end_layer_idx {end}. Lower it.")
        return self


def _not_empty(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    if not routes:
        raise ValueError("needs a route at least. Remove tread_config to train every block on all tokens.")
    return routes


class TreadConfig(Section):
    """Routes of the image tokens."""

    routes: Annotated[tuple[Route, ...], AfterValidator(_not_empty)]


def _object(value: object) -> object:
    value = none_word(value)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError('must be an object such as {"routes": [...]}.') from error


OptionalTreadConfig = Annotated[TreadConfig | None, BeforeValidator(_object)]
