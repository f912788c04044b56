"""Which keys of config.json are about which kind of model, as plain data; read before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping

DIFFUSION_KEYS = frozenset({"snr_gamma", "rescale_betas_zero_snr", "validation_guidance_rescale"})
FLOW_KEYS = frozenset(
    {
        "flow_sigmoid_scale",
        "flow_use_uniform_schedule",
        "flow_use_beta_schedule",
        "flow_beta_schedule_alpha",
        "flow_beta_schedule_beta",
        "flow_schedule_shift",
        "flow_schedule_auto_shift",
    }
)
GUIDANCE_KEYS = frozenset(
    {"flux_guidance_mode", "flux_guidance_value", "flux_guidance_min", "flux_guidance_max"}
)
"""About models that are told a guidance scale."""
NO_GUIDANCE: Mapping[str, object] = {"flux_guidance_mode": "constant", "flux_guidance_value": 1.0}
"""What those keys say where no guidance is asked for."""
UNET_KEYS = frozenset({"pretrained_unet_model_name_or_path", "pretrained_unet_subfolder"})
TRANSFORMER_KEYS = frozenset(
    {"pretrained_transformer_model_name_or_path", "pretrained_transformer_subfolder"}
)


def unused_guidance_keys(values: Mapping[str, object], *, instead: str) -> dict[str, str]:
    """Key -> what is wrong with asking for guidance from a flavour that is told none."""
    flavour = values["model_flavour"]
    asked = [key for key, default in NO_GUIDANCE.items() if values.get(key, default) != default]
    return dict.fromkeys(asked, f"model_flavour {flavour} is told no guidance. Remove it, or take {instead}.")


def single_file(values: Mapping[str, object], key: str, *, what: str) -> dict[str, str]:
    """The key -> what is wrong with naming a single file, where the key does."""
    value = str(values.get(key))
    if not value.endswith(".safetensors"):
        return {}
    return {
        key: f"{value}: is a single file, and {what} read from folders and repositories only. "
        "Give a folder that holds config.json beside the weights."
    }
