"""Adapters on a denoiser, and the command line as a user types it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simpletuner import cli
from simpletuner.helpers.adapters.network import LycorisAdapter, attach_adapter
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.contracts import ModelSpec


def attach_tlora(denoiser: Any, spec: ModelSpec, *, off_start: float = 0.0, **options: Any) -> LycorisAdapter:
    """A T-LoRA of rank 8, its factors moved off their start; options are keys of the lycoris json."""
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 8.0, "tlora_min_rank": 2}
    config = LycorisConfig.model_validate(values | options | {"raw": values | options})
    adapter = attach_adapter(
        denoiser.eval(), AdapterConfig(lora_type="lycoris"), lycoris=config, spec=spec, seed=0
    )
    assert isinstance(adapter, LycorisAdapter)
    move_off_start(adapter, by=off_start)
    return adapter


def move_off_start(adapter: LycorisAdapter, *, by: float) -> None:
    """Add normal noise to every factor, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `simpletuner arguments` in this process; its exit code."""
    monkeypatch.setattr("sys.argv", ["simpletuner", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)
