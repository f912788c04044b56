"""Shift of noise levels in config.json."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from simpletuner.helpers.configuration.schema.base import OptionalNonNegativeNumber, Section, contradiction


class ShiftConfig(Section):
    """Shift of the noise levels of flow matching."""

    flow_schedule_shift: OptionalNonNegativeNumber = None
    """Shift of noise levels in training and sampling; above 1 is more noise, 0 and 1 do not shift. null takes
    the shift of the model's own scheduler."""
    flow_schedule_auto_shift: bool = False
    """Shift by the number of image tokens, not by the model's own scheduler."""
    flux2_training_shift: Literal["sampling", "flux1"] = "sampling"
    """Flux.2's shift in training: sampling, that of its pipelines; flux1, that of Flux.1, with less noise.
    Validation images keep that of the pipelines. Not with flow_schedule_shift."""

    @model_validator(mode="after")
    def _is_one_shift(self) -> Self:
        if self.flow_schedule_auto_shift and self.flow_schedule_shift is not None:
            raise contradiction(
                "flow_schedule_shift",
                f"{self.flow_schedule_shift:g} has no effect with flow_schedule_auto_shift. Remove one.",
                "flow_schedule_auto_shift",
            )
        if self.flux2_training_shift != "sampling" and self.flow_schedule_shift is not None:
            raise contradiction(
                "flux2_training_shift",
                f"{self.flux2_training_shift} has no effect with flow_schedule_shift. Remove one.",
                "flow_schedule_shift",
            )
        return self
