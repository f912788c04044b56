"""Noise schedules: the training one, and the samplers that a pipeline can use."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import Component, class_of, quiet

SAMPLERS: Mapping[str, type[SchedulerMixin]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
"""Name that a user writes -> sampling scheduler of a diffusion model."""

_ALSO_IN_MODELS = (
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.PNDMScheduler,
)
_BY_CLASS_NAME = {kind.__name__: kind for kind in (*SAMPLERS.values(), *_ALSO_IN_MODELS)}


def training_alpha_bars(component: Component, *, zero_snr: bool) -> Tensor:
    """[T] float32: the share of signal variance left at each training timestep of a model's scheduler.

    Args:
        component: The model's scheduler.
        zero_snr: Rescale so that the last timestep holds no signal.
    """
    with quiet():
        scheduler = diffusers.DDPMScheduler.from_config(
            dict(component.config), rescale_betas_zero_snr=zero_snr
        )
    alpha_bars: Tensor = scheduler.alphas_cumprod
    return alpha_bars


def make_sampler(
    component: Component, *, name: str | None, prediction: str, zero_snr: bool
) -> SchedulerMixin:
    """A sampling scheduler with a model's noise schedule.

    Args:
        component: The model's own scheduler.
        name: One of SAMPLERS; None takes the class of the model's own.
        prediction: What the denoiser predicts.
        zero_snr: The schedule ends without signal, so sampling starts at the very last timestep.

    Raises:
        ModelError: The name, or the class in the model folder, is not known.
    """
    if name is None:
        kind = _BY_CLASS_NAME.get(class_of(component.config))
        if kind is None:
            raise ModelError(
                f"{component.folder}: {class_of(component.config)} is not a sampler of a diffusion model. "
                f"Name one in validation_noise_scheduler: {', '.join(SAMPLERS)}."
            )
    elif name in SAMPLERS:
        kind = SAMPLERS[name]
    else:
        raise ModelError(f"Noise scheduler {name!r} is not known. Known ones: {', '.join(SAMPLERS)}.")
    changes: dict[str, object] = {"prediction_type": prediction}
    if zero_snr:
        # Source: Lin et al., arXiv:2305.08891, section 3.3.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with quiet():
        sampler: SchedulerMixin = kind.from_config({**component.config, **changes})
    return sampler
