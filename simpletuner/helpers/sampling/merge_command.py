"""`simpletuner merge` and `resize` with --model: the base model names the layers of other programs' files."""

from __future__ import annotations

from simpletuner.helpers.adapters.files.rewriting import BaseModel
from simpletuner.helpers.models.denoiser_weights import find_denoiser


def base_model(where: str | None) -> BaseModel | None:
    """The denoiser of a model, whose weights are not read; None without one.

    Raises:
        ModelError: The model has no configuration, or is of no known family.
    """
    if where is None:
        return None
    found = find_denoiser(where, option="--model")
    return BaseModel(family=found.family, denoiser=found.on_meta())
