"""The section on loss, noise, noise levels and guidance; the text below a field is its reference line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.helpers.choices.losses import HUBER_SCHEDULES, LOSSES
from simpletuner.helpers.configuration.schema.base import (
    NUM_TIMESTEPS,
    CountOrZero,
    NonNegativeNumber,
    Number,
    OneOf,
    OptionalNonNegativeNumber,
    OptionalPositiveNumber,
    PositiveNumber,
    PositiveShare,
    Section,
    Share,
    Timestep,
    none_word,
)
from simpletuner.helpers.configuration.schema.values import is_off, numbers

MODE_SCALES = (-1, 1.75)
"""Lowest and highest at which the noise level is a monotonic function of the share.

Source: Esser et al., arXiv:2403.03206, equation 20: from -1 to 2 / (pi - 2), 1.7519.
"""

BiasStrategy = Literal["none", "earlier", "later", "range"]


def _loss(value: object) -> object:
    """SimpleTuner's spellings: in any case, or switched off."""
    return "l2" if is_off(value) else value.strip().lower() if isinstance(value, str) else value


def _strategy(value: object) -> object:
    return "none" if is_off(value) else value


Numbers = Annotated[tuple[Number, ...] | None, BeforeValidator(numbers), BeforeValidator(none_word)]


class NoiseConfig(Section):
    """Loss, noise and noise levels in training, and the guidance embedding."""

    loss_type: Annotated[str, OneOf(LOSSES), BeforeValidator(_loss)] = "l2"
    """Loss of the prediction."""
    huber_c: PositiveShare = 0.1
    """Parameter of huber_schedule, for loss_type huber and smooth_l1."""
    huber_schedule: Annotated[str, OneOf(HUBER_SCHEDULES)] = "snr"
    """How c, the error at which these turn from squared to absolute, depends on the noise level."""
    snr_gamma: OptionalPositiveNumber = None
    """Gamma of min-SNR loss weights, usually 5; null or 0 for equal weights. This key and those from
    use_soft_min_snr to multires_noise_discount are for diffusion, not for flow matching."""
    use_soft_min_snr: bool = False
    """Let the weights of snr_gamma bend smoothly, without a corner."""
    soft_min_snr_sigma_data: PositiveNumber = 1.0
    """Standard deviation of the latents that use_soft_min_snr assumes."""
    debiased_estimation_loss: bool = False
    """Weight the loss by 1 / sqrt(SNR); with v-prediction by 1 / (SNR + 1)."""
    offset_noise: bool = False
    """Add to the noise of some samples a normal number for each channel, times noise_offset."""
    noise_offset: NonNegativeNumber = 0.1
    """Strength of offset_noise."""
    noise_offset_probability: Share = 0.25
    """Fraction of samples with offset_noise."""
    multires_noise_iterations: CountOrZero = 0
    """Coarser and coarser noise images that are added to the noise, usually 6 to 10; 0 for none."""
    multires_noise_discount: PositiveShare = 0.3
    """Strength of each of these, as a share of the one before."""
    input_perturbation: NonNegativeNumber = 0.0
    """Strength of further noise in the denoiser's input alone, which it is not to predict; usually 0.1."""
    input_perturbation_steps: CountOrZero = 0
    """Optimiser steps over which input_perturbation falls to 0, linearly; 0 keeps it."""
    min_timestep: Timestep = 0
    """Lowest timestep that training draws."""
    max_timestep: Timestep = NUM_TIMESTEPS
    """Upper end of the timesteps that training draws. A diffusion model draws lower ones only."""
    timestep_bias_strategy: Annotated[BiasStrategy, BeforeValidator(_strategy)] = "none"
    """Timesteps that are drawn more often, or less: earlier, the timestep_bias_portion with the least noise;
    later, that with the most; range, those from timestep_bias_begin on and below timestep_bias_end. For
    diffusion."""
    timestep_bias_multiplier: PositiveNumber = 1.0
    """How many times as often as others these timesteps are drawn."""
    timestep_bias_begin: Timestep = 0
    """First timestep with range."""
    timestep_bias_end: Timestep = NUM_TIMESTEPS
    """End of the timesteps with range, which is no longer among them."""
    timestep_bias_portion: Share = 0.25
    """Share of the timesteps with earlier and later."""
    flow_sigmoid_scale: PositiveNumber = 1.0
    """Noise levels are the sigmoid of flow_sigmoid_mean plus a normal number times this; larger is wider. All
    keys that begin with flow are for flow matching."""
    flow_sigmoid_mean: Number = 0.0
    """Above 0 is more noise, below 0 less."""
    flow_use_uniform_schedule: bool = False
    """Draw noise levels uniformly instead."""
    flow_use_beta_schedule: bool = False
    """Draw noise levels from a beta distribution instead."""
    flow_beta_schedule_alpha: PositiveNumber = 2.0
    """First parameter of the beta distribution; above the second it prefers high noise."""
    flow_beta_schedule_beta: PositiveNumber = 2.0
    """Second parameter of the beta distribution."""
    flow_use_mode_schedule: bool = False
    """Draw noise levels from the distribution with heavy tails instead."""
    flow_mode_schedule_scale: Number = 1.29
    """Its parameter, from -1 to 1.75: above 0 prefers medium noise levels, below 0 the lowest and highest."""
    flow_cubic_schedule_weights: Numbers = None
    """Draw noise levels instead from a density through these weights, at equal distances from no noise to
    noise alone; for instance [0.1, 1, 0.3]."""
    flow_custom_timesteps: Numbers = None
    """Draw these noise levels instead, without a shift: all in [0, 1], or all timesteps in [0, 1000]."""
    flow_timesteps_mode: Literal["fixed-list", "round-robin"] = "fixed-list"
    """fixed-list draws one of flow_custom_timesteps for each sample; round-robin takes them in turn."""
    flow_schedule_shift: OptionalNonNegativeNumber = None
    """Shift of noise levels in training and sampling; above 1 is more noise, 0 and 1 do not shift. null takes
    the shift of the model's own scheduler."""
    flow_schedule_auto_shift: bool = False
    """Shift by the number of image tokens, not by the model's own scheduler."""
    flux2_training_shift: Literal["sampling", "flux1"] = "sampling"
    """Flux.2's shift in training: sampling, that of its pipelines; flux1, that of Flux.1, with less noise.
    Validation images keep that of the pipelines. Not with flow_schedule_shift."""
    flux_guidance_mode: Literal["constant", "random-range"] = "constant"
    """Guidance embedding in training: constant, flux_guidance_value; random-range, uniform between
    flux_guidance_min and flux_guidance_max."""
    flux_guidance_value: NonNegativeNumber = 1.0
    """Guidance with constant."""
    flux_guidance_min: NonNegativeNumber = 0.0
    """Lowest guidance with random-range."""
    flux_guidance_max: NonNegativeNumber = 4.0
    """Highest guidance with random-range."""
    flux_attention_masked_training: bool = False
    """Mask padding tokens in attention during training and validation."""


Problem = tuple[tuple[str, ...], str]
"""Keys that do not fit together, the first of which shows the message; the message."""


def noise_problems(noise: NoiseConfig) -> Iterator[Problem]:
    """Every combination of keys that contradicts itself."""
    yield from _weights(noise)
    yield from _timesteps(noise)
    yield from _flow_levels(noise)
    low, high = noise.flux_guidance_min, noise.flux_guidance_max
    if low > high:
        keys = ("flux_guidance_min", "flux_guidance_max")
        yield keys, f"{low:g} is above flux_guidance_max {high:g}. Lower it."


def _weights(noise: NoiseConfig) -> Iterator[Problem]:
    if noise.use_soft_min_snr and noise.snr_gamma is None:
        text = "bends the weights of snr_gamma, which is not set. Set snr_gamma, usually to 5, or remove it."
        yield ("use_soft_min_snr", "snr_gamma"), text


def _timesteps(noise: NoiseConfig) -> Iterator[Problem]:
    low, high = noise.min_timestep, noise.max_timestep
    if low >= high:
        text = f"{low} is not below max_timestep {high}. Lower it, or raise max_timestep."
        yield ("min_timestep", "max_timestep"), text
    if noise.timestep_bias_strategy == "none":
        return
    begin, end = biased_timesteps(noise, NUM_TIMESTEPS)
    if begin >= end:
        if noise.timestep_bias_strategy == "range":
            text = f"{begin} is not below timestep_bias_end {end}. Lower it, or raise timestep_bias_end."
            yield ("timestep_bias_begin", "timestep_bias_end", "timestep_bias_strategy"), text
        else:
            text = f"{noise.timestep_bias_portion:g} of the timesteps is none of them. Raise it."
            yield ("timestep_bias_portion", "timestep_bias_strategy"), text
    elif noise.timestep_bias_multiplier == 1:
        text = "1 changes nothing. Set how many times as often the timesteps are to be drawn."
        yield ("timestep_bias_multiplier", "timestep_bias_strategy"), text
    elif begin <= low and high <= end:
        text = f"{noise.timestep_bias_strategy} takes in every timestep that is drawn, so it changes nothing."
        yield ("timestep_bias_strategy",), f"{text} Remove it, or choose fewer timesteps."


def _flow_levels(noise: NoiseConfig) -> Iterator[Problem]:
    ways = {
        "flow_use_uniform_schedule": noise.flow_use_uniform_schedule,
        "flow_use_beta_schedule": noise.flow_use_beta_schedule,
        "flow_use_mode_schedule": noise.flow_use_mode_schedule,
        "flow_cubic_schedule_weights": noise.flow_cubic_schedule_weights is not None,
        "flow_custom_timesteps": noise.flow_custom_timesteps is not None,
    }
    chosen = [key for key, is_set in ways.items() if is_set]
    for other in chosen[1:]:
        text = f"cannot be set with {chosen[0]}: noise levels have one distribution. Remove one."
        yield (other, chosen[0]), text
    yield from _level_values(noise)
    if noise.flow_schedule_auto_shift and noise.flow_schedule_shift is not None:
        text = f"{noise.flow_schedule_shift:g} has no effect with flow_schedule_auto_shift. Remove one."
        yield ("flow_schedule_shift", "flow_schedule_auto_shift"), text
    if noise.flux2_training_shift != "sampling" and noise.flow_schedule_shift is not None:
        text = f"{noise.flux2_training_shift} has no effect with flow_schedule_shift. Remove one."
        yield ("flux2_training_shift", "flow_schedule_shift"), text


def _level_values(noise: NoiseConfig) -> Iterator[Problem]:
    lowest, highest = MODE_SCALES
    if not lowest <= noise.flow_mode_schedule_scale <= highest:
        text = f"{noise.flow_mode_schedule_scale:g} must be from {lowest:g} to {highest:g}."
        yield ("flow_mode_schedule_scale",), text
    weights, levels = noise.flow_cubic_schedule_weights, noise.flow_custom_timesteps
    if weights is not None and (len(weights) < 2 or min(weights) < 0 or max(weights) <= 0):
        text = "must be at least two numbers of 0 or above, and one of them above 0."
        yield ("flow_cubic_schedule_weights",), f"{_shown(weights)}: {text}"
    if levels is not None and (not levels or min(levels) < 0 or max(levels) > NUM_TIMESTEPS):
        text = "must be noise levels in [0, 1], or timesteps in [0, 1000]."
        yield ("flow_custom_timesteps",), f"{_shown(levels)}: {text}"
    if levels is not None and (noise.min_timestep, noise.max_timestep) != (0, NUM_TIMESTEPS):
        text = "lists every noise level, so min_timestep and max_timestep have no effect. Remove them."
        yield ("flow_custom_timesteps", "min_timestep", "max_timestep"), text


def biased_timesteps(noise: NoiseConfig, num_timesteps: int) -> tuple[int, int]:
    """The first of the biased timesteps, and the one behind the last; equal numbers for none.

    Source: generate_timestep_weights of diffusers' script train_text_to_image_sdxl.py.
    """
    number = int(noise.timestep_bias_portion * num_timesteps)
    return {
        "none": (0, 0),
        "earlier": (0, number),
        "later": (num_timesteps - number, num_timesteps),
        "range": (noise.timestep_bias_begin, noise.timestep_bias_end),
    }[noise.timestep_bias_strategy]


def _shown(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{each:g}' for each in values)}]"
