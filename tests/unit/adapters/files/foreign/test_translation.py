"""What a file of another program is read as, before a denoiser is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.adapters.files.adapter_file import SCHEDULE_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.translation import paths_in, read_parts
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError
from tests.unit.adapters.files.foreign.makers import make

LORA = {"lora_down.weight": torch.ones(4, 6), "lora_up.weight": torch.ones(3, 4)}


def file_of(parts: dict[str, Tensor], *, layer: str = "lycoris_proj", **metadata: str) -> AdapterFile:
    return AdapterFile(
        Path("a.safetensors"), {f"{layer}.{part}": tensor for part, tensor in parts.items()}, metadata
    )


@pytest.mark.parametrize(("stated", "kept"), [(0, 1), (1, 1), (3, 3)])
def test_namesake_keeps_its_last_rank_but_at_least_one(stated: int, kept: int) -> None:
    reading = read_parts(file_of(LORA | {"tlora_current_rank": torch.tensor(stated)}))
    layer = reading.foreign.layers["proj"]
    assert layer.keys() == {*LORA, "alpha"}
    assert (layer["lora_down.weight"].shape, layer["lora_up.weight"].shape) == ((kept, 6), (3, kept))


def test_schedule_of_the_user_keeps_the_other_values_of_the_header() -> None:
    stated = RankSchedule(4, min_rank=2, alpha=2.0, num_timesteps=500)
    file = file_of(LORA, **{SCHEDULE_KEY: json.dumps(stated.config())})
    found = read_parts(file, schedule={"min_rank": 3}).found
    assert found is not None
    assert found.schedule == RankSchedule(4, min_rank=3, alpha=2.0, num_timesteps=500)


@pytest.mark.parametrize("extra", [{}, {"alpha": torch.tensor(2.0)}, {"dtype_tensor": torch.tensor(0.0)}])
def test_standard_lora_with_a_schedule_is_marked_as_t_lora(extra: dict[str, Tensor]) -> None:
    reading = read_parts(file_of(LORA | extra), schedule={"min_rank": 2})
    assert "tlora_schedule" in reading.foreign.layers["proj"]


@pytest.mark.parametrize(("stated", "found"), [("0", 1), ("3", 3), ("99", 4)])
def test_minimum_of_a_header_is_brought_into_the_range_of_the_rank(stated: str, found: int) -> None:
    schedule = read_parts(file_of(LORA, ss_tlora_min_rank=stated)).found
    assert schedule is not None
    assert schedule.schedule.min_rank == found


@pytest.mark.parametrize(
    ("max_rank", "found"), [(1, 1), (2, 1), (3, 1), (4, 2)], ids=lambda rank: f"rank {rank}"
)
def test_masked_locon_keeps_half_of_its_ranks_but_at_least_one(max_rank: int, found: int) -> None:
    parts = {"lora_down.weight": torch.ones(max_rank, 6), "lora_up.weight": torch.ones(3, max_rank)}
    schedule = read_parts(file_of(parts, ss_network_args='{"use_timestep_mask": "true"}')).found
    assert schedule is not None
    assert schedule.schedule.min_rank == found


@pytest.mark.parametrize(
    ("block", "is_idle"), [("single_transformer_blocks.9", True), ("transformer_blocks.9", False)]
)
def test_only_layers_of_single_blocks_may_be_idle(block: str, is_idle: bool) -> None:
    layers = ("transformer_blocks.1.attn.processor.to_q_lora", f"{block}.attn.processor.to_out_lora")
    tensors = {
        f"{layer}.{part}": torch.ones(shape)
        for layer in layers
        for part, shape in {"down.weight": (4, 32), "up.weight": (32, 4)}.items()
    }
    file = AdapterFile(Path("a.safetensors"), tensors, {})
    if is_idle:
        assert paths_in(file, make("flux")) == ["transformer_blocks.1.attn.to_q"]
    else:
        with pytest.raises(AdapterError, match=block):
            paths_in(file, make("flux"))
