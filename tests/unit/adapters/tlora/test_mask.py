"""Setting, holding and clearing the mask."""

from __future__ import annotations

import threading

import pytest
import torch
from lycoris.modules.tlora import clear_timestep_mask, get_timestep_mask, set_timestep_mask

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import LayerRanks, RankSchedule
from simpletuner.helpers.training.lycoris import (
    apply_tlora_inference_mask,
    apply_tlora_timestep_mask,
    clear_tlora_mask,
)

SCHEDULE = RankSchedule(8)


def test_public_mask_is_the_one_that_lycoris_returns() -> None:
    apply_tlora_timestep_mask(torch.tensor([0, 500]), 1000, 8)
    found = get_timestep_mask()
    clear_tlora_mask()
    assert torch.equal(found, SCHEDULE.mask([0, 500]))
    assert get_timestep_mask() is None


def test_setting_a_training_mask_while_one_is_held_raises() -> None:
    apply_tlora_timestep_mask([10], 1000, 8)
    try:
        with pytest.raises(RuntimeError, match="group 0"):
            apply_tlora_timestep_mask([20], 1000, 8)
        with pytest.raises(RuntimeError, match="group 0"):
            apply_tlora_inference_mask(20, 1000, 8)
    finally:
        clear_tlora_mask()


def test_mask_of_a_networks_own_group_is_held_too() -> None:
    group = mask.new_group()
    with (
        mask.rank_mask(SCHEDULE, [1], group=group),
        pytest.raises(RuntimeError, match=f"group {group}"),
    ):
        mask.set_mask(SCHEDULE, [2], group=group)
    mask.set_mask(SCHEDULE, [2], group=group)
    mask.clear_mask(group)


def test_inference_masks_replace_each_other() -> None:
    for timestep in (999, 500, 1):
        apply_tlora_inference_mask(torch.tensor(timestep), 1000, 8)
        assert torch.equal(mask.current_mask(0, 8), SCHEDULE.mask([timestep]))
    clear_tlora_mask()


def test_mask_is_cleared_when_the_body_raises() -> None:
    group = mask.new_group()
    with pytest.raises(KeyError), mask.rank_mask(SCHEDULE, [1], group=group):
        raise KeyError
    assert mask.current_mask(group, 8) is None


def test_layers_of_another_rank_get_a_mask_of_their_own_width() -> None:
    group = mask.new_group()
    mask.join_group(group, layer=LayerRanks(4))
    with mask.rank_mask(RankSchedule(8, min_rank=6), [0, 1000], group=group):
        assert mask.current_mask(group, 8).tolist() == [[1] * 8, [1] * 6 + [0] * 2]
        assert mask.current_mask(group, 4).tolist() == [[1] * 4, [1] * 4]


def test_groups_do_not_see_each_other_but_all_see_the_public_one() -> None:
    first, second = mask.new_group(), mask.new_group()
    mask.join_group(first, layer=LayerRanks(8))
    mask.join_group(second, layer=LayerRanks(8))
    with mask.rank_mask(SCHEDULE, [0], group=first):
        assert mask.current_mask(second, 8) is None
        apply_tlora_inference_mask(1000, 1000, 8)
        assert mask.current_mask(first, 8).sum() == 8
        assert mask.current_mask(second, 8).sum() == 1
        clear_tlora_mask()


@pytest.mark.parametrize(("timesteps", "shared"), [([500], 4), ([500, 501], 4), ([0, 1000], None)])
def test_shared_rank_is_known_only_when_all_samples_have_it(timesteps: list[int], shared: int | None) -> None:
    with mask.rank_mask(SCHEDULE, timesteps, group=0):
        found = mask.mask_group(0).current(LayerRanks(8))
        assert found is not None
        assert found.shared_rank == shared


def test_mask_is_visible_on_another_thread() -> None:
    seen: list[object] = []
    with mask.rank_mask(SCHEDULE, [500], group=0):
        thread = threading.Thread(target=lambda: seen.append(mask.current_mask(0, 8)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], SCHEDULE.mask([500]))


def test_no_timestep_and_a_timestep_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="timestep"):
        mask.set_mask(SCHEDULE, [])
    with pytest.raises(ValueError, match=r"1001.*0\.\.1000"):
        apply_tlora_timestep_mask([1001], 1000, 8)


def test_layers_with_values_of_their_own_get_masks_of_their_own() -> None:
    group, own = mask.new_group(), LayerRanks(4, min_rank=3, alpha=2.0)
    mask.join_group(group, layer=own)
    mask.join_group(group, layer=LayerRanks(4))
    with mask.rank_mask(RankSchedule(8, min_rank=2), [500, 1000], group=group):
        assert mask.current_mask(group, 4).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
        found = mask.mask_group(group).current(own)
        assert found is not None
        assert found.values.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
        assert found.shared_rank == 3


@pytest.mark.parametrize("training", [True, False])
def test_public_functions_keep_the_scale_of_layers_that_have_one(training: bool) -> None:
    scaled = LayerRanks(4, is_scaled=True)
    mask.join_group(0, layer=scaled)
    if training:
        apply_tlora_timestep_mask([500], 1000, 4)
    else:
        apply_tlora_inference_mask(500, 1000, 4)
    try:
        assert mask.current_mask(0, 4).tolist() == [[1, 1, 0, 0]]
        found = mask.mask_group(0).current(scaled)
        assert found is not None
        assert (found.values.tolist(), found.gain) == ([[2, 2, 0, 0]], 2.0)
        assert torch.equal(get_timestep_mask(), SCHEDULE.for_rank(4).mask([500]))
    finally:
        clear_tlora_mask()


def test_mask_set_through_lycoris_is_scaled_for_layers_that_are() -> None:
    set_timestep_mask(torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]]), 0)
    try:
        plain, scaled = (mask.mask_group(0).current(LayerRanks(4, is_scaled=each)) for each in (False, True))
    finally:
        clear_timestep_mask(0)
    assert plain is not None
    assert scaled is not None
    assert plain.values.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert scaled.values.tolist() == [[2, 2, 0, 0], [4, 0, 0, 0]]


def test_values_of_both_halves_follow_the_device() -> None:
    values = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    found = mask.RankMask(values, shared_rank=None, max_rank=3)
    on_cpu = found.of_both_halves(torch.device("cpu"))
    assert torch.equal(on_cpu, torch.cat([values, values], dim=1))
    assert found.of_both_halves(torch.device("cpu")) is on_cpu
    assert found.of_both_halves(torch.device("meta")).is_meta
