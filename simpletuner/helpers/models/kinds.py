"""Which keys of config.json are about which kind of model, as plain data; read before torch is imported."""

from __future__ import annotations

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
UNET_KEYS = frozenset({"pretrained_unet_model_name_or_path", "pretrained_unet_subfolder"})
TRANSFORMER_KEYS = frozenset(
    {"pretrained_transformer_model_name_or_path", "pretrained_transformer_subfolder"}
)
FLOW_SAMPLERS = ("euler",)
"""Sampling schedulers of flow-matching models."""
