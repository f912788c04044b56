"""Attach an adapter from a lycoris json, or a standard LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.models.sdxl.spec import SPEC

TLORA = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 4.0, "tlora_min_rank": 2}


def lycoris_config(values: Mapping[str, Any]) -> LycorisConfig:
    own = {key: value for key, value in values.items() if key in LycorisConfig.model_fields}
    extra = {key: value for key, value in values.items() if key not in own}
    return LycorisConfig.model_validate(own | {"extra": extra, "raw": dict(values)})


def attach(
    model: nn.Module,
    lycoris: Mapping[str, Any] | None = None,
    *,
    spec: ModelSpec = SPEC,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """The adapter of these lycoris values, a standard LoRA without them; settings are those of the run."""
    if lycoris is None:
        return attach_adapter(model, AdapterConfig(**settings), lycoris=None, spec=spec, seed=seed)
    # Unvalidated settings: init_lora needs the context of a configuration file.
    config = AdapterConfig.model_construct(**(dict(AdapterConfig(lora_type="lycoris")) | settings))
    return attach_adapter(model, config, lycoris=lycoris_config(lycoris), spec=spec, seed=seed)
