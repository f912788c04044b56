"""Noise schedules of diffusion models: the training schedule and the samplers of a pipeline."""

from __future__ import annotations

import diffusers
from diffusers import SchedulerMixin
from torch import Tensor

from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import Component, class_of, quiet

# Samplers that a model's own folder may name, besides those of the registry.
ONLY_IN_MODELS = (
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.PNDMScheduler,
)


def training_alpha_bars(component: Component, *, zero_snr: bool) -> Tensor:
    """[T] float32: fraction of signal variance at each training timestep of a model's scheduler.

    Args:
        component: The model's scheduler.
        zero_snr: Rescale so that the last timestep has no signal.
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
        prediction: Prediction type of the denoiser.
        zero_snr: The schedule ends without signal, so sampling starts at the very last timestep.

    Raises:
        ModelError: The name, or the class in the model folder, is not known.
    """
    diffusion = {key: each for key, each in SAMPLERS.items() if "diffusion" in each.schedulers}
    if name is None:
        classes = (*(each.load_for("diffusion") for each in diffusion.values()), *ONLY_IN_MODELS)
        own_class = class_of(component.config)
        sampler_class = next((each for each in classes if each.__name__ == own_class), None)
        if sampler_class is None:
            raise ModelError(
                f"{component.folder}: {own_class} is not a sampler of a diffusion model. "
                f"Name one in validation_noise_scheduler: {', '.join(diffusion)}."
            )
    elif name in diffusion:
        sampler_class = diffusion[name].load_for("diffusion")
    else:
        raise ModelError(
            f"Sampler {name!r} is not known for diffusion models. Known ones: {', '.join(diffusion)}."
        )
    changes: dict[str, object] = {"prediction_type": prediction}
    if zero_snr:
        # Source: Lin et al., arXiv:2305.08891, section 3.3.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with quiet():
        sampler: SchedulerMixin = sampler_class.from_config({**component.config, **changes})
    return sampler
