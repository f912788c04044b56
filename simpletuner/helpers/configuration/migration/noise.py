"""Noise and noise levels that several programs set in the same way."""

from __future__ import annotations

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import number
from simpletuner.helpers.configuration.migration.draft import Settings
from simpletuner.helpers.configuration.schema.noise import MODE_SCALES


def put_offset_noise(settings: Settings, key: str) -> None:
    """Offset noise of this strength for every sample."""
    strength = abs(settings.number(key))
    if not strength:
        settings.skip(key)
        return
    settings.draft.config.update({"offset_noise": True, "noise_offset_probability": 1.0})
    settings.put(key, "noise_offset", strength)


def levels_of_scheme(scheme: str, *, mean: float, spread: float, scale: float) -> dict[str, JsonValue]:
    """Our keys of a weighting_scheme of diffusers' scripts; empty for one that weights the loss.

    The scripts draw a place in the list of timesteps, which begins with noise alone, so the mean has the
    other sign here. The distribution mode is symmetric.
    """
    if scheme == "logit_normal":
        return {
            "flow_sigmoid_scale": number(spread),
            **({"flow_sigmoid_mean": number(-mean)} if mean else {}),
        }
    if scheme == "mode" and MODE_SCALES[0] <= scale <= MODE_SCALES[1]:
        return {"flow_use_mode_schedule": True, "flow_mode_schedule_scale": number(scale)}
    return {"flow_use_uniform_schedule": True} if scheme in ("none", "uniform", "") else {}
