"""Groups of configuration keys and checks that several specs share. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DIFFUSION_KEYS = frozenset(
    {
        "snr_gamma",
        "use_soft_min_snr",
        "soft_min_snr_sigma_data",
        "debiased_estimation_loss",
        "offset_noise",
        "noise_offset",
        "noise_offset_probability",
        "multires_noise_iterations",
        "multires_noise_discount",
        "timestep_bias_strategy",
        "timestep_bias_multiplier",
        "timestep_bias_begin",
        "timestep_bias_end",
        "timestep_bias_portion",
        "rescale_betas_zero_snr",
        "validation_guidance_rescale",
    }
)
FLOW_KEYS = frozenset(
    {
        "flow_sigmoid_scale",
        "flow_sigmoid_mean",
        "flow_use_uniform_schedule",
        "flow_use_beta_schedule",
        "flow_beta_schedule_alpha",
        "flow_beta_schedule_beta",
        "flow_use_mode_schedule",
        "flow_mode_schedule_scale",
        "flow_cubic_schedule_weights",
        "flow_custom_timesteps",
        "flow_timesteps_mode",
        "flow_schedule_shift",
        "flow_schedule_auto_shift",
    }
)
GUIDANCE_KEYS = frozenset(
    {"flux_guidance_mode", "flux_guidance_value", "flux_guidance_min", "flux_guidance_max"}
)
"""Keys of models with a guidance embedding."""
NO_GUIDANCE: Mapping[str, object] = {"flux_guidance_mode": "constant", "flux_guidance_value": 1.0}
"""Values of these keys that mean no guidance."""
UNET_KEYS = frozenset({"pretrained_unet_model_name_or_path", "pretrained_unet_subfolder"})
TRANSFORMER_KEYS = frozenset(
    {"pretrained_transformer_model_name_or_path", "pretrained_transformer_subfolder", "tread_config"}
)


@dataclass(frozen=True, slots=True)
class Flavour:
    """One published model of a family."""

    repository: str
    has_guidance: bool
    """Whether the denoiser has a guidance embedding."""


def unused_guidance_keys(
    values: Mapping[str, object], flavours: Mapping[str, Flavour], *, instead: str
) -> dict[str, str]:
    """Error messages for guidance keys set on a flavour without a guidance embedding."""
    flavour = flavours.get(str(values.get("model_flavour")))
    if flavour is None or flavour.has_guidance:
        return {}
    keys = [key for key, default in NO_GUIDANCE.items() if values.get(key, default) != default]
    return dict.fromkeys(
        keys,
        f"model_flavour {values['model_flavour']} has no guidance embedding. Remove it, or set "
        f"model_flavour to {instead}.",
    )


def unreadable_single_file(values: Mapping[str, object], key: str, *, component: str) -> dict[str, str]:
    """Error message for a key that names a single file if its component is read from folders only."""
    value = str(values.get(key))
    if not value.endswith(".safetensors"):
        return {}
    return {
        key: f"{value} is a single file, but {component} must be a folder or repository. "
        "Give a folder with config.json beside the weights."
    }
