"""Which rank schedule the layers of a pipeline's denoiser follow."""

from __future__ import annotations

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
