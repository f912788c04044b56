"""The section of config.json on model_type full."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from simpletuner.helpers.configuration.schema.base import Section


def _patterns(value: object) -> object:
    """Patterns of a list, or of a comma-separated text."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error.msg}. Correct it.") from error
    return value


class WholeModelConfig(Section):
    """The weights of the denoiser; keys for model_type full."""

    layer_filter: Annotated[
        tuple[Annotated[str, AfterValidator(_expression)], ...], BeforeValidator(_patterns)
    ] = ()
    """Train only weights in whose names one of these is found, each a part of a name or a regular expression:
    a list, or comma-separated. Empty trains all weights."""
    fused_backward_pass: bool = False
    """Step each weight in the backward pass, as soon as its gradient is complete, and free the gradient: the
    same results with less memory."""
