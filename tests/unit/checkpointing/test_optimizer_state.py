"""Every optimiser resumes exactly: 10 steps, saved, loaded, 10 more, against 20 in one go, bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.adapter import Adapter
from simpletuner.helpers.adapters.trainable import one_group
from simpletuner.helpers.checkpointing.optimizer_state import load_optimizer_state, optimizer_state
from simpletuner.helpers.checkpointing.progress import Progress
from simpletuner.helpers.checkpointing.state import RunState
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.schema.sections import OptimizerConfig
from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.training.lr_schedules import build_lr_schedule
from simpletuner.helpers.training.optimizers import build_optimizer, weights_for_use

# A matrix whose state is packed, one that is too small for that, a vector, a convolution.
SHAPES = ((64, 96), (6, 4), (5,), (3, 2, 2, 2))
HALF = 10
NAMES = list(OPTIMIZERS)
AVERAGING = [name for name, record in OPTIMIZERS.items() if record.has_averages]
FLOAT = torch.float32

# On a CPU there is nothing to page.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")
# Movement of a weight without a gradient over three steps, in learning rates: on a CPU bitsandbytes stores a
# 0 as 2e-5 of the largest number of its block, and Lion takes the sign of that.
DRIFT = {"bnb-adamw8bit": 0.02, "bnb-adamw8bit-paged": 0.02, "bnb-lion8bit": 2.001}
every_optimizer = pytest.mark.parametrize("name", NAMES)


class Matrices(Adapter):
    """Parameters of several shapes."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES
        ]

    def parameters(self) -> list[nn.Parameter]:
        return self.weights

    def state_dict(self) -> dict[str, Tensor]:
        return {str(index): weight.detach() for index, weight in enumerate(self.weights)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for index, weight in enumerate(self.weights):
            weight.data.copy_(state[str(index)])

    def content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        raise NotImplementedError

    def save(self, file: Path, *, metadata: Mapping[str, str]) -> None:
        file.write_text(json.dumps([weight.double().sum().item() for weight in self.weights]))

    def set_strength(self, strength: float) -> None:
        raise NotImplementedError

    def init_from(self, file: Path) -> None:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError


@dataclass
class Run:
    """A run of one optimiser without a model: the gradient of a step depends on the weights and the step."""

    state: RunState
    schedule: Any

    def train(self, steps: int) -> None:
        for _ in range(steps):
            step = self.state.progress.step
            generator = torch.Generator().manual_seed(step)
            torch.manual_seed(step)  # the trainer seeds each micro-batch: stochastic rounding draws from it
            for weight in self.state.trainable.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.grad = (weight.detach().float() - 0.3 + noise).to(weight.dtype)
            self.state.optimizer.step()
            self.schedule.step()
            self.state.progress.advance(samples=1)

    def weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.state.trainable.parameters()]


def new_run(name: str, dtype: torch.dtype = FLOAT, *, folder: Path | None = None, **keys: Any) -> Run:
    rate = {} if OPTIMIZERS[name].default_learning_rate == 1.0 else {"learning_rate": 1e-2}
    config = OptimizerConfig(optimizer=name, lr_scheduler="cosine", **{**rate, **keys})
    adapter, progress = Matrices(dtype), Progress()
    optimizer = build_optimizer(one_group("adapter", adapter.parameters()), config)
    state = RunState(
        trainable=adapter,
        optimizer=optimizer,
        progress=progress,
        metadata={},
        averages=lambda: weights_for_use(optimizer, config),
    )
    if folder is not None:
        state.load(folder)
    schedule = build_lr_schedule(optimizer, config, max_steps=4 * HALF, step=state.progress.step)
    return Run(state, schedule)


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """torchao compiles its step anew for each shape, for seconds; its state is the same without."""
    is_slow = request.node.get_closest_marker("slow") is not None
    with torch.compiler.set_stance("default" if is_slow else "force_eager"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ao-adamw8bit", "ao-adamw4bit"])
def test_resumed_run_of_compiled_steps_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    test_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, FLOAT, tmp_path)


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16], ids=["float32", "bf16"])
@every_optimizer
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, first = new_run(name, dtype), new_run(name, dtype)
    whole.train(2 * HALF)
    first.train(HALF)
    first.state.save(tmp_path)
    with first.state.averages():  # images
        pass
    resumed = new_run(name, dtype, folder=tmp_path)
    assert resumed.state.digest() == first.state.digest()
    for run in (first, resumed):
        run.train(HALF)
        assert run.state.digest() == whole.state.digest()
    assert all(weight.dtype == dtype for weight in resumed.weights())


@every_optimizer
def test_every_optimizer_moves_every_parameter(name: str) -> None:
    run = new_run(name)
    before = run.weights()
    run.train(HALF)
    for old, new in zip(before, run.weights(), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(old, new)


@every_optimizer
def test_zero_gradients_move_nothing_and_leave_numbers_finite(name: str) -> None:
    """As of closed ranks, and of one factor in the first step, whose other factor is 0."""
    weights = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = build_optimizer(one_group("adapter", weights), OptimizerConfig(optimizer=name))
    for step in range(6):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
            weight.grad[:2] = 0 if step < 3 else 1 + torch.arange(weight[0].numel()).view_as(weight[0])
        optimizer.step()
        for weight in weights:
            assert torch.isfinite(weight).all()
            assert weight[2:].abs().max() <= DRIFT.get(name, 0.0) * optimizer.param_groups[0]["lr"]
            assert bool(weight[:2].any()) == (step >= 3)


VARIANTS = {
    "adamw, betas": ("adamw", {"betas": [0.8, 0.9]}),
    "adafactor, beta1": ("adafactor", {"beta1": 0.9}),
    "prodigyplus, speed": ("prodigyplus", {"use_speed": True, "weight_decay": 0.1}),
    "prodigyplus, steps": ("prodigyplus", {"prodigy_steps": 15, "factored": False}),
    "prodigyplus, plain": ("prodigyplus", {"use_schedulefree": False}),
    "dadaptation, growth": ("dadaptation", {"growth_rate": 1.02}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_change_the_run_and_it_stays_exact(variant: str, tmp_path: Path) -> None:
    name, arguments = VARIANTS[variant]
    plain, whole, first = new_run(name), *(new_run(name, optimizer_config=arguments) for _ in range(2))
    for run, steps in ((plain, 2 * HALF), (whole, 2 * HALF), (first, HALF)):
        run.train(steps)
    first.state.save(tmp_path)
    resumed = new_run(name, folder=tmp_path, optimizer_config=arguments)
    resumed.train(HALF)
    assert resumed.state.digest() == whole.state.digest()
    assert not all(torch.equal(*pair) for pair in zip(plain.weights(), whole.weights(), strict=True))


@every_optimizer
def test_step_depends_on_nothing_but_gradients_so_that_processes_stay_equal(name: str) -> None:
    one, other = new_run(name), new_run(name)
    weights = [run.state.trainable.parameters() for run in (one, other)]
    for step in range(3):
        for seed, own, run in zip((1, 2), weights, (one, other), strict=True):
            torch.manual_seed(seed)  # another stream in each process
            for weight in own:
                weight.grad = torch.full_like(weight, 0.1 * (step + 1)) + weight.detach()
            run.state.optimizer.step()
    assert one.state.digest() == other.state.digest()


@pytest.mark.parametrize("name", AVERAGING)
def test_averages_are_computed_beside_the_trained_weights(name: str) -> None:
    run = new_run(name)
    run.train(HALF)
    optimizer, parameters = run.state.optimizer, run.state.trainable.parameters()
    trained, pointers, digest = run.weights(), [each.data_ptr() for each in parameters], run.state.digest()
    beta1 = optimizer.param_groups[0]["betas"][0]
    with contextlib.suppress(KeyError), run.state.averages():
        for weight, old in zip(parameters, trained, strict=True):
            average = old + (optimizer.state[weight]["z"] - old) * (1 - 1 / beta1)
            torch.testing.assert_close(weight.detach(), average)
            assert not torch.equal(weight, old)
        raise KeyError("a sampler that fails")
    assert [each.data_ptr() for each in parameters] == pointers
    assert run.state.digest() == digest


@pytest.mark.parametrize("name", AVERAGING)
def test_adapter_file_has_the_averages_and_the_training_state_the_trained_weights(
    name: str, tmp_path: Path
) -> None:
    run = new_run(name)
    run.train(HALF)
    with run.state.averages():
        averages = [weight.double().sum().item() for weight in run.weights()]
    run.state.save(tmp_path)
    assert json.loads((tmp_path / ADAPTER_FILE).read_text()) == averages
    for one, other in zip(new_run(name, folder=tmp_path).weights(), run.weights(), strict=True):
        assert torch.equal(one, other)


def test_weights_for_use_of_other_optimizers_are_the_trained_ones() -> None:
    run = new_run("adamw")
    run.train(1)
    trained = run.weights()
    with run.state.averages():
        assert all(torch.equal(*pair) for pair in zip(trained, run.weights(), strict=True))


class Odd(torch.optim.Optimizer):
    """Keeps values of every kind that a checkpoint can hold, and one of the caller's choice."""

    def __init__(self, params: Any, lr: float = 0.1, size: float = 1.0, kept: object = None) -> None:
        super().__init__(params, {"lr": lr, "size": size})
        table = torch.arange(3, dtype=torch.int16)
        self.param_groups[0] |= {"k": 0, "limit": math.inf, "low": -math.inf, "running": torch.tensor(2.0)}
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "codes": torch.arange(7, dtype=torch.uint8),
                "moment": torch.ones(2, 3, dtype=torch.float64),
                "count": 1001,
                "shape": (2, 3),
                "nested": {
                    "table": table,
                    "same": table,
                    "names": ["a", None, True],
                    "dtype": torch.bfloat16,
                },
                "kept": kept,
            }


def saved(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as it comes back from files."""
    tensors, numbers = optimizer_state(optimizer)
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(
        json.dumps(numbers, allow_nan=False)
    )


def test_values_of_every_kind_come_back_with_their_types_and_dtypes() -> None:
    first, second = (Odd([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]) for _ in range(2))
    (group,), (state,) = first.param_groups, first.state.values()
    group |= {"k": 3, "size": 5.0, "running": torch.tensor(4.0)}
    state |= {"count": 1002, "shape": (4, 5)}
    state["nested"]["table"] += 1
    tensors, numbers = saved(first)
    for values in second.state.values():
        values.clear()
    load_optimizer_state(second, tensors, numbers=numbers)
    (own_group,), (own,) = second.param_groups, second.state.values()
    assert (own_group["k"], own_group["limit"], own_group["low"]) == (3, math.inf, -math.inf)
    assert own_group["running"].item() == 4.0
    assert own_group["size"] == 1.0  # configuration
    assert (own["count"], own["shape"], type(own["count"])) == (1002, (4, 5), int)
    assert (own["codes"].dtype, own["moment"].dtype) == (torch.uint8, torch.float64)
    assert own["nested"]["names"] == ["a", None, True]
    assert own["nested"]["dtype"] is torch.bfloat16
    assert own["nested"]["table"] is own["nested"]["same"]
    assert own["nested"]["table"].tolist() == [1, 2, 3]


class Wrapped(torch.Tensor):
    """A packed tensor whose package has not registered it."""

    def __new__(cls, codes: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: object) -> Any:
        return cls(parts["codes"])

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "kept",
    [{1, 2}, {1: 2}, torch.Generator(), Wrapped(torch.ones(2))],
    ids=["set", "keys", "generator", "packed"],
)
def test_value_that_a_checkpoint_cannot_hold_is_named(kept: object) -> None:
    run = new_run("adamw")
    run.state.optimizer = Odd(run.state.trainable.parameters(), kept=kept)
    with pytest.raises(CheckpointError, match=r"0\.kept .*optimizer"):
        run.state.check_optimizer()


def test_packed_class_of_a_file_is_none_of_those_that_are_known() -> None:
    run = new_run("ao-adamw8bit")
    run.train(1)
    tensors, numbers = saved(run.state.optimizer)
    numbers["state"]["0"]["exp_avg"]["packed"]["class"] = "os.system"
    with pytest.raises(CheckpointError, match=r"os\.system"):
        load_optimizer_state(new_run("ao-adamw8bit").state.optimizer, tensors, numbers=numbers)


def test_paged_state_is_loaded_into_paged_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new_run("bnb-adamw8bit-paged"), new_run("bnb-adamw8bit-paged")
    first.train(1)
    own: Any = first.state.optimizer.state[first.state.trainable.parameters()[0]]
    own["state1"].is_paged = True  # on a GPU bitsandbytes sets it
    paged = torch.zeros_like(own["state1"])
    monkeypatch.setattr(second.state.optimizer, "get_state_buffer", lambda parameter, dtype: paged)
    load_optimizer_state(
        second.state.optimizer, *saved(first.state.optimizer)[:1], numbers=saved(first.state.optimizer)[1]
    )
    loaded = second.state.optimizer.state[second.state.trainable.parameters()[0]]
    assert loaded["state1"] is paged
    assert torch.equal(paged, own["state1"])


def earlier(
    tensors: dict[str, Tensor], numbers: dict[str, Any], *, group_state: tuple[str, ...]
) -> dict[str, Any]:
    """The JSON as earlier versions wrote it: without the tensors, and with chosen entries of a group."""
    return {
        "state": {},
        "groups": [{name: group[name] for name in group_state} for group in numbers["groups"]],
        "tensors": sorted(tensors),
    }


@pytest.mark.parametrize(
    ("name", "group_state"),
    [("adamw", ()), ("prodigy", ("d", "d_max", "d_numerator", "d_denom", "k"))],
    ids=["adamw", "prodigy"],
)
def test_state_of_earlier_versions_is_loaded_exactly(name: str, group_state: tuple[str, ...]) -> None:
    whole, resumed = new_run(name), new_run(name)
    whole.train(HALF)
    tensors, numbers = saved(whole.state.optimizer)
    if name == "prodigy":
        steps = {index: {"step": values["step"]} for index, values in numbers["state"].items()}
        old = earlier(tensors, numbers, group_state=group_state) | {"state": steps}
    else:
        old = earlier(tensors, numbers, group_state=group_state)
    load_optimizer_state(resumed.state.optimizer, tensors, numbers=old)
    fresh = {key: value for key, value in saved(resumed.state.optimizer)[1].items() if key != "groups"}
    assert fresh == {key: value for key, value in numbers.items() if key != "groups"}
    for own, other in zip(saved(resumed.state.optimizer)[1]["groups"], numbers["groups"], strict=True):
        assert {key: own[key] for key in group_state} == {key: other[key] for key in group_state}


@every_optimizer
def test_schedule_sets_the_rate_of_every_group(name: str) -> None:
    run = new_run(name)
    rates = []
    for _ in range(3):
        run.train(1)
        rates.append([float(group["lr"]) for group in run.state.optimizer.param_groups])
    assert rates[0] > rates[1] > rates[2]
    assert all(len(set(rate)) == 1 for rate in rates)


@every_optimizer
def test_number_of_bytes_counts_what_is_saved(name: str) -> None:
    run = new_run(name)
    run.train(1)
    tensors, _ = optimizer_state(run.state.optimizer)
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith("group")}
    adapter = sum(weight.numel() * 4 for weight in run.state.trainable.parameters())
    counted = run.state.num_bytes - 2 * adapter
    assert counted == sum(tensor.numel() * tensor.element_size() for tensor in own.values())


def test_muon_is_torchs_own_on_matrices_and_adamw_elsewhere() -> None:
    run = new_run("muon")
    twins = [nn.Parameter(weight) for weight in run.weights()]
    matrices = torch.optim.Muon(
        [each for each in twins if each.ndim == 2], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    others = torch.optim.AdamW([each for each in twins if each.ndim != 2], lr=1e-2)
    for step in range(3):
        own = run.state.trainable.parameters()
        for parameter in (*own, *twins):
            parameter.grad = parameter.detach() + 0.1 * step
        for optimizer in (run.state.optimizer, matrices, others):
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(run.state.trainable.parameters(), twins, strict=True))


def test_muon_trains_an_adapter_of_matrices_alone() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer(one_group("adapter", [weight]), OptimizerConfig(optimizer="muon"))
    weight.grad = torch.eye(4, 3)
    optimizer.step()
    tensors, numbers = saved(optimizer)
    assert list(tensors) == ["0.momentum_buffer"]
    load_optimizer_state(optimizer, tensors, numbers=numbers)
    assert not torch.equal(weight, torch.ones(4, 3))
