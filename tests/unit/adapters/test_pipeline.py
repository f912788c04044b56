"""Which rank schedule the layers of a pipeline's denoiser follow."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from simpletuner.helpers.adapters.pipeline import schedules_of
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule


@pytest.mark.parametrize(
    ("config", "num_timesteps"),
    [({"max_rank": 4, "min_rank": 2}, 500), ({"max_rank": 4, "min_rank": 2, "num_timesteps": 100}, 100)],
    ids=["of the scheduler", "of the config"],
)
def test_layers_without_a_schedule_follow_the_config_over_the_timesteps_of_the_scheduler(
    config: dict[str, int], num_timesteps: int
) -> None:
    layer = TLoraLayer("lycoris_proj", nn.Linear(12, 8), 1.0, 4, 4.0)
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=500))
    found = schedules_of(layer, config=config, scheduler=scheduler)
    assert found == {layer.mask_group_id: RankSchedule(4, min_rank=2, num_timesteps=num_timesteps)}


@pytest.mark.parametrize("module", ["adapters.pipeline", "adapters.rebuilding"])
def test_importing_a_module_that_reads_files_or_samples_registers_the_layers(module: str) -> None:
    code = (
        f"import simpletuner.helpers.{module}; from lycoris.modules import MODULE_LIST; "
        "print(*(each.__name__ for each in MODULE_LIST[:2]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["TLokrLayer", "TLoraLayer"]
