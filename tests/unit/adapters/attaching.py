"""Attach an adapter from a lycoris json, or a standard LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import AdapterConfig
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
    config = AdapterConfig(lora_type="standard" if lycoris is None else "lycoris")
    config = AdapterConfig.model_construct(**(dict(config) | settings))
    network = None if lycoris is None else lycoris_config(lycoris)
    return attach_adapter(model, config, lycoris=network, spec=spec, seed=seed)
