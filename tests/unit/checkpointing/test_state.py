"""The state of a run: exact over a save and a load, for every optimiser, and refused when it does not fit."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.trainable import one_group
from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.checkpointing.state import RunState, optimizer_state
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    ADAPTER_STATE_FILE,
    COUNTERS_FILE,
    OPTIMIZER_FILE,
)
from simpletuner.helpers.training.optimizers import build_optimizer


class TwoLinears(Adapter):
    """The smallest thing with parameters that is an adapter."""

    kind, num_layers = "linears", 2

    def __init__(self, *, width: int = 4) -> None:
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.layers.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return self.layers.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.layers.load_state_dict(state)

    def set_strength(self, strength: float) -> None:
        raise NotImplementedError

    def init_from(self, file: Path) -> None:
        raise NotImplementedError

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        raise NotImplementedError

    def save(self, file: Path, *, metadata: Mapping[str, str]) -> None:
        file.write_text(json.dumps(metadata))

    def detach(self) -> None:
        raise NotImplementedError


def new_state(optimizer: str = "adamw", *, width: int = 4, **keys: object) -> RunState:
    adapter = TwoLinears(width=width)
    config = OptimizerConfig(optimizer=optimizer, learning_rate=0.1, **keys)
    return RunState(
        trainable=adapter,
        optimizer=build_optimizer(one_group("adapter", adapter.parameters()), config),
        progress=Progress(),
        metadata={"seed": "7"},
    )


def train(state: RunState, steps: int) -> None:
    """Steps whose gradient depends on the step, so that a lost counter shows."""
    for _ in range(steps):
        inputs = torch.full((2, 4), 0.1 * (state.progress.step + 1))
        state.trainable.layers(inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.progress.advance(samples=2)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_state_resumed_from_files_ends_bitwise_equal_to_an_uninterrupted_one(
    tmp_path: Path, optimizer: str
) -> None:
    whole, first, second = (new_state(optimizer) for _ in range(3))
    train(whole, 6)
    train(first, 3)
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.digest() == first.digest()
    train(second, 3)
    assert second.digest() == whole.digest()


def test_digest_depends_on_weights_optimiser_and_counters() -> None:
    digests = set()
    state = new_state()
    for change in (
        lambda: None,
        lambda: train(state, 1),
        lambda: state.progress.advance(samples=1),
        lambda: state.optimizer.state[state.trainable.parameters()[0]]["exp_avg"].add_(1e-7),
        lambda: state.trainable.parameters()[0].data.add_(1e-6),
    ):
        change()
        digests.add(state.digest())
    assert len(digests) == 5


def test_state_keeps_the_configuration_of_the_resuming_run(tmp_path: Path) -> None:
    first = new_state(optimizer_config={"weight_decay": 0.5})
    train(first, 1)
    first.save(tmp_path)
    second = new_state(optimizer_config={"weight_decay": 0.25})
    second.load(tmp_path)
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.25


def test_state_of_the_gradient_scaler_is_kept(tmp_path: Path) -> None:
    first, second = new_state(), new_state()
    first.scaler, second.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 2.0))
    first.save(tmp_path)
    second.load(tmp_path)
    assert second.scaler.get_scale() == 8.0


def test_state_files_hold_no_pickle(tmp_path: Path) -> None:
    state = new_state("prodigy")
    train(state, 1)
    state.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [ADAPTER_FILE, ADAPTER_STATE_FILE, OPTIMIZER_FILE, COUNTERS_FILE]
    )
    assert json.loads((tmp_path / ADAPTER_FILE).read_text()) == {"seed": "7", "steps": "1"}


@pytest.mark.parametrize("name", [ADAPTER_STATE_FILE, OPTIMIZER_FILE, COUNTERS_FILE])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"{}"])
@pytest.mark.reliability_row(7)
def test_state_with_a_missing_or_garbage_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    state = new_state()
    train(state, 1)
    state.save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        new_state().load(tmp_path)


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    state = new_state()
    train(state, 1)
    state.save(tmp_path)
    other = new_state(width=8)
    other.trainable.load_state_dict = lambda state: None  # type: ignore[method-assign]  # only the optimiser is looked at
    with pytest.raises(CheckpointError, match="shape"):
        other.load(tmp_path)


@pytest.mark.reliability_row(12)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_with_an_optimiser_tensor_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    state = new_state()
    train(state, 1)
    state.optimizer.state[state.trainable.parameters()[0]]["exp_avg"][0] = value
    state.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"0\.exp_avg"):
        new_state().load(tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
@pytest.mark.parametrize("kept", [0, 1, -1])
@pytest.mark.reliability_row(7)
def test_optimiser_file_with_missing_tensors_is_refused(tmp_path: Path, optimizer: str, kept: int) -> None:
    state = new_state(optimizer)
    train(state, 1)
    state.save(tmp_path)
    tensors = load_file(tmp_path / OPTIMIZER_FILE)
    left = dict(sorted(tensors.items())[:kept])
    assert len(left) < len(tensors)
    save_file(left, tmp_path / OPTIMIZER_FILE)
    first = next(name for name in sorted(tensors) if name not in left)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*missing.* {first}"):
        new_state(optimizer).load(tmp_path)


def test_optimiser_state_of_an_earlier_version_is_loaded(tmp_path: Path) -> None:
    first, second = new_state(), new_state()
    train(first, 1)
    first.save(tmp_path)
    counters = json.loads((tmp_path / COUNTERS_FILE).read_bytes())
    del counters["optimizer"]["tensors"]
    (tmp_path / COUNTERS_FILE).write_text(json.dumps(counters))
    second.load(tmp_path)
    assert second.digest() == first.digest()


def test_number_of_bytes_is_that_of_the_tensors_and_those_of_the_adapter_twice(tmp_path: Path) -> None:
    state = new_state()
    train(state, 1)
    tensors, _ = optimizer_state(state.optimizer)
    numel = sum(tensor.numel() for tensor in tensors.values())
    assert state.num_bytes == 4 * (2 * sum(weight.numel() for weight in state.trainable.parameters()) + numel)


@pytest.mark.reliability_row(5)
def test_full_disk_under_a_tensor_file_is_the_systems_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("simpletuner.helpers.checkpointing.state.save_tensors", fail)
    with pytest.raises(OSError, match="No space") as info:
        new_state().save(tmp_path)
    assert info.value.errno == errno.ENOSPC


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_state_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        (tmp_path / "made").mkdir()
        new_state().save(tmp_path / "made")
    finally:
        os.umask(previous)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "made").iterdir()} == {0o666 & ~umask}


def test_loaded_state_leaves_its_files_free_to_be_removed(tmp_path: Path) -> None:
    first, second = new_state(width=4), new_state(width=4)
    train(first, 1)
    first.save(tmp_path)
    second.load(tmp_path)
    mapped = Path("/proc/self/maps").read_text()
    assert [file.name for file in tmp_path.iterdir() if str(file) in mapped] == []
