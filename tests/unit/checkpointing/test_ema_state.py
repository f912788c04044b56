"""The EMA in checkpoints: 10 steps, saved, loaded and 10 more are 20 in one go; and the two adapter files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.adapters.ema import Ema
from simpletuner.helpers.checkpointing.state import RunState
from simpletuner.helpers.configuration.schema.ema import EmaConfig
from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COUNTERS_FILE,
    EMA_ADAPTER_FILE,
    EMA_STATE_FILE,
)
from tests.unit.checkpointing.test_state import new_state, train


def ema_state(**keys: object) -> RunState:
    state = new_state()
    state.ema = Ema(state.trainable, EmaConfig(use_ema=True, **keys), device=torch.device("cpu"))
    return state


def train_averaged(state: RunState, steps: int) -> None:
    assert state.ema is not None
    for _ in range(steps):
        train(state, 1)
        state.ema.update(state.progress.step)


@pytest.mark.parametrize("interval", [1, 3])
def test_resumed_average_is_the_uninterrupted_one_bit_for_bit(interval: int, tmp_path: Path) -> None:
    whole, first, second = (ema_state(ema_update_interval=interval) for _ in range(3))
    train_averaged(whole, 20)
    train_averaged(first, 10)
    first.save(tmp_path)
    averages = [state.ema for state in (whole, first, second)]
    assert None not in averages
    with averages[1].weights():  # images
        pass
    second.load(tmp_path)
    assert second.digest() == first.digest()
    train_averaged(second, 10)
    assert second.digest() == whole.digest()
    assert all(map(torch.equal, averages[2].tensors().values(), averages[0].tensors().values()))
    assert averages[2].num_updates == averages[0].num_updates == 20 // interval


def test_digest_sees_the_average_and_its_counter() -> None:
    digests = set()
    for change in ("nothing", "average", "counter", "no average"):
        state = ema_state()
        train_averaged(state, 2)
        assert state.ema is not None
        tensors, updates = state.ema.tensors(), state.ema.num_updates
        if change == "average":
            tensors["1"] = tensors["1"].nextafter(torch.tensor(9.0))
        state.ema.load(tensors, num_updates=updates + (change == "counter"))
        if change == "no average":
            state.ema = None
        digests.add(state.digest())
    assert len(digests) == 4


@pytest.mark.parametrize("choice", ["plain", "main"])
def test_header_says_which_weights_a_file_has(choice: str, tmp_path: Path) -> None:
    state = ema_state(ema_adapter_file=choice)
    assert state.save_weights(tmp_path) == [tmp_path / ADAPTER_FILE, tmp_path / EMA_ADAPTER_FILE]
    main, second = (json.loads((tmp_path / name).read_text()) for name in (ADAPTER_FILE, EMA_ADAPTER_FILE))
    plain, average = (main, second) if choice == "plain" else (second, main)
    assert plain == {"seed": "7", "steps": "0", "adapter_weights": "plain"}
    assert average == {"seed": "7", "steps": "0", "adapter_weights": "ema", "ema_decay": "0.995"}


def test_without_an_average_files_and_checkpoint_are_as_before(tmp_path: Path) -> None:
    new_state().save(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert not names & {EMA_ADAPTER_FILE, EMA_STATE_FILE}
    assert json.loads((tmp_path / ADAPTER_FILE).read_text()) == {"seed": "7", "steps": "0"}
    assert "ema" not in json.loads((tmp_path / COUNTERS_FILE).read_text())


def test_average_that_is_switched_on_later_starts_from_the_weights_of_that_step(tmp_path: Path) -> None:
    before, after = new_state(), ema_state()
    train(before, 3)
    before.save(tmp_path)
    train_averaged(after, 1)
    after.load(tmp_path)
    assert after.ema is not None
    assert after.ema.num_updates == 0
    assert all(map(torch.equal, after.ema.tensors().values(), before.trainable.parameters()))


def test_average_that_is_switched_off_later_is_left(tmp_path: Path) -> None:
    averaged, plain = ema_state(), new_state()
    train_averaged(averaged, 2)
    averaged.save(tmp_path)
    plain.load(tmp_path)
    assert all(map(torch.equal, plain.trainable.parameters(), averaged.trainable.parameters()))


def test_decay_of_the_configuration_counts_on_resume(tmp_path: Path) -> None:
    before, after = ema_state(), ema_state(ema_decay=0.0)
    train_averaged(before, 2)
    before.save(tmp_path)
    after.load(tmp_path)
    train_averaged(after, 1)
    assert after.ema is not None
    assert all(map(torch.equal, after.ema.tensors().values(), after.trainable.parameters()))


def test_checkpoint_whose_average_is_gone_is_refused(tmp_path: Path) -> None:
    state = ema_state()
    state.save(tmp_path)
    (tmp_path / EMA_STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="resume_from_checkpoint"):
        ema_state().load(tmp_path)


def test_needed_disk_space_counts_the_average_twice() -> None:
    plain, averaged = new_state(), ema_state()
    assert averaged.num_bytes - plain.num_bytes == 2 * 4 * sum(
        p.numel() for p in plain.trainable.parameters()
    )
