"""The T-LoKr layer against the Kronecker product written out in float64, and its file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules import get_module, make_module
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.files.low_rank import Keep
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions
from simpletuner.helpers.adapters.files.merging import merge_adapters
from simpletuner.helpers.adapters.files.resizing import ResizeOptions, resize_adapter
from simpletuner.helpers.adapters.files.rewriting import BaseModel
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.lokr_layer import TLokrLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io import logs
from simpletuner.helpers.models import registry
from tests.unit.adapters.attaching import TLORA, attach

RANK = 4
SCHEDULE = RankSchedule(RANK)
SCALED = RankSchedule(RANK, scale="active")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "conv1d": lambda: nn.Conv1d(24, 40, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1, dilation=2),
    "conv2d 1x1": lambda: nn.Conv2d(24, 40, 1),
}
INPUTS = {"linear": (3, 5, 24), "conv1d": (3, 24, 7), "conv2d": (3, 24, 9, 9), "conv2d 1x1": (3, 24, 6, 6)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"factor": 2},
    "both": {"factor": 8, "decompose_both": True, "lora_dim": 2},
    "unbalanced": {"factor": 2, "unbalanced_factorization": True},
}
TLOKR = {**TLORA, "algo": "tlokr", "linear_dim": 4, "factor": 2, "tlora_min_rank": 1}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    logs.reset_log_once()


def adapt(layer: nn.Module, *, trained: float = 0.0, **options: Any) -> TLokrLayer:
    """Attach a T-LoKr layer; with `trained` its parameters have moved by that standard deviation."""
    values = {"lora_dim": RANK, "alpha": 2.0, "factor": 2, "schedule": SCHEDULE} | options
    adapter = TLokrLayer("lycoris_layer", layer, 1.0, mask_group_id=mask.new_group(), **values)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * trained)
    adapter.apply_to()
    return adapter


def run(adapter: TLokrLayer, layer: nn.Module, x: Tensor, *timesteps: int) -> Tensor:
    assert adapter.schedule is not None
    with mask.rank_mask(adapter.schedule, timesteps, group=adapter.mask_group_id):
        return layer(x)


def dense_output(adapter: TLokrLayer, layer: Any, x: Tensor, rank: int, gain: float = 1.0) -> Tensor:
    """The layer's output with the delta of its first ranks in its weight, in float64."""
    state = {key: value.detach().double() for key, value in adapter.custom_state_dict().items()}
    first = state["lokr_w1"] if "lokr_w1" in state else state["lokr_w1_a"] @ state["lokr_w1_b"]
    second = state["lokr_w2_a"][:, :rank] @ state["lokr_w2_b"][:rank]
    rows = [torch.cat([value * second for value in row], dim=1) for row in first]
    delta = torch.cat(rows) * float(state["alpha"]) / adapter.lora_dim * gain
    twin = copy.deepcopy(layer)
    for name, _ in list(twin.named_children()):
        delattr(twin, name)
    twin._forward_hooks.clear()
    twin = twin.double()
    with torch.no_grad():
        twin.weight += delta.view(twin.weight.shape)
        return twin(x.double())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("timestep", [0, 400, 1000])
def test_output_is_that_of_the_dense_product(kind: str, options: dict[str, Any], timestep: int) -> None:
    layer, x = LAYERS[kind](), torch.randn(INPUTS[kind])
    schedule = RankSchedule(options.get("lora_dim", RANK))
    adapter = adapt(layer, trained=0.2, **options | {"schedule": schedule})
    assert ("lokr_w1_a" in adapter.custom_state_dict()) == ("decompose_both" in options)
    expected = dense_output(adapter, layer, x, schedule.rank_at(timestep))
    torch.testing.assert_close(run(adapter, layer, x, timestep).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("schedule", [SCHEDULE, SCALED], ids=["rank", "active"])
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_of_timesteps_equals_single_samples(kind: str, schedule: RankSchedule) -> None:
    layer, x, timesteps = LAYERS[kind](), torch.randn(INPUTS[kind]), (0, 500, 1000)
    adapter = adapt(layer, trained=0.2, schedule=schedule)
    batch = run(adapter, layer, x, *timesteps)
    for row, timestep in enumerate(timesteps):
        rank, sample = schedule.rank_at(timestep), x[row : row + 1]
        expected = dense_output(adapter, layer, sample, rank, schedule.gain_at(rank))
        torch.testing.assert_close(batch[row : row + 1].double(), expected, rtol=0, atol=2e-5)
        single = run(adapter, layer, sample, timestep)
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 24), (8, 8, 24), (12, 12, 24)])
def test_batch_masks_samples_and_neither_tokens_nor_blocks(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(shape)
    adapter = adapt(layer, trained=0.2)
    timesteps = [int(t) for t in torch.linspace(0, 1000, shape[0])]
    singles = torch.cat([run(adapter, layer, x[i : i + 1], t) for i, t in enumerate(timesteps)])
    torch.testing.assert_close(run(adapter, layer, x, *timesteps), singles, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_exactly_zero_at_the_start(kind: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[kind]().to(dtype), torch.randn(INPUTS[kind], dtype=dtype)
    expected = layer(x)
    adapter = adapt(layer)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    for timestep in (0, 500, 1000):
        assert torch.equal(run(adapter, layer, x, timestep), expected)


@pytest.mark.parametrize("timesteps", [(500, 750), (500, 500)], ids=str)
def test_gradients_are_those_of_the_dense_product_and_closed_ranks_have_none(
    timesteps: tuple[int, ...],
) -> None:
    layer, x = nn.Linear(24, 40).requires_grad_(False), torch.randn(2, 5, 24)
    adapter = adapt(layer, trained=0.2, schedule=SCALED)
    run(adapter, layer, x, *timesteps).square().sum().backward()
    twin = {key: value.detach().double().requires_grad_() for key, value in adapter.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for row, timestep in enumerate(timesteps):
        rank = SCALED.rank_at(timestep)
        second = twin["lokr_w2_a"][:, :rank] @ twin["lokr_w2_b"][:rank]
        weight = layer.weight.double() + torch.kron(twin["lokr_w1"], second) * 0.5 * RANK / rank
        total = total + (x[row].double() @ weight.T + layer.bias.double()).square().sum()
    total.backward()
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), twin[key].grad, rtol=1e-4, atol=1e-4)
    assert adapter.lokr_w2_b.grad[:2].abs().sum() > 0
    assert adapter.lokr_w2_b.grad[2:].abs().sum() == 0
    assert adapter.lokr_w2_a.grad[:, 2:].abs().sum() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones_while_the_mask_is_held(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layer = nn.Linear(24, 24)
        adapter, x = adapt(layer, trained=0.1), torch.randn(2, 5, 24, requires_grad=True)
        with mask.rank_mask(SCHEDULE, [300, 900], group=adapter.mask_group_id):
            y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
            y.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(recomputed, plain)


def test_training_without_a_mask_and_a_mask_of_another_rank_are_refused() -> None:
    layer, x = nn.Linear(24, 40), torch.randn(2, 24)
    adapter = adapt(layer)
    with pytest.raises(RuntimeError, match=r"lycoris_layer.*apply_tlora_timestep_mask"):
        layer(x)
    other = mask.rank_mask(RankSchedule(16), [5], group=adapter.mask_group_id)
    with pytest.raises(AdapterError, match=r"max_rank 16\b.*\b4\b"), other:
        layer(x)


def test_compiled_layer_is_one_graph_at_every_timestep() -> None:
    layer, x = nn.Linear(24, 40).eval(), torch.randn(3, 5, 24)
    adapter = adapt(layer, trained=0.2, schedule=SCALED)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for timestep in (200, 500, 900):
            with mask.rank_mask(SCALED, [timestep], group=adapter.mask_group_id):
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", LAYERS)
def test_dense_delta_is_that_of_the_mask(kind: str) -> None:
    layer, x = LAYERS[kind]().eval(), torch.randn(INPUTS[kind])
    adapter = adapt(layer, trained=0.2, schedule=SCALED)
    with torch.no_grad(), mask.rank_mask(SCALED, [500], group=adapter.mask_group_id):
        delta, expected = adapter.get_diff_weight()[0], layer(x)
    adapter.restore()
    with torch.no_grad():
        layer.weight += delta
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_max_norm_bounds_the_delta_itself() -> None:
    adapter = adapt(nn.Linear(24, 40).eval(), trained=0.2)
    assert adapter.apply_max_norm(0.05)[0]
    assert float(adapter.get_diff_weight()[0].detach().norm()) == pytest.approx(0.05, rel=1e-4)
    assert not adapter.apply_max_norm(0.06)[0]


def test_factors_depend_on_seed_and_name_alone() -> None:
    def factors(name: str, seed: int) -> Tensor:
        torch.randn(3)  # the global generator moves on
        return TLokrLayer(name, nn.Linear(24, 40), 1.0, RANK, factor=2, seed=seed).lokr_w2_a

    assert torch.equal(factors("a", 0), factors("a", 0))
    assert not torch.equal(factors("a", 0), factors("b", 0))
    assert not torch.equal(factors("a", 0), factors("a", 1))


@pytest.mark.parametrize(
    ("layer", "rank", "found"),
    [
        (nn.Linear(24, 40), 10, r"rank 10 is too high.*20x12.*below 10\b"),
        (nn.Conv2d(24, 40, 3, groups=2), 2, "groups"),
        (nn.LayerNorm(24), 2, "LayerNorm"),
    ],
    ids=["rank", "groups", "class"],
)
def test_layer_that_cannot_be_adapted_is_refused_by_name(layer: nn.Module, rank: int, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"lycoris_layer.*{found}"):
        TLokrLayer("lycoris_layer", layer, 1.0, rank, factor=2)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(24, 40), nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x) * self.to_k(x)


def denoiser() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Attention()).requires_grad_(False).eval()


def trained_file(folder: Path, **options: Any) -> tuple[nn.Module, Any, Path]:
    model = denoiser()
    adapter = attach(model, TLOKR | {"apply_preset": {"target_module": ["Attention"]}} | options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    adapter.save(folder / "adapter.safetensors", metadata={"model_family": "sdxl"})
    return model, adapter, folder / "adapter.safetensors"


@pytest.mark.parametrize("main", ["lokr", "tlokr"])
@pytest.mark.parametrize("flag", ["use_scalar", "rs_lora", "full_matrix", "weight_decompose"])
def test_flag_of_another_algorithm_is_none_of_its_layers(flag: str, main: str) -> None:
    (other,) = {"lokr", "tlokr"} - {main}
    entry = {"target_module": ["Attention"], "name_algo_map": {".*to_k": {"algo": other}}}
    layers = attach(denoiser(), {**TLOKR, "algo": main, "apply_preset": entry, flag: True}).network.loras
    plain = attach(denoiser(), {**TLOKR, "apply_preset": {"target_module": ["Attention"]}}).network.loras
    (found,) = (layer for layer in layers if isinstance(layer, TLokrLayer))
    (expected,) = (layer for layer in plain if layer.lora_name == found.lora_name)
    assert dict(found.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    assert (found.scale, float(found.alpha)) == (expected.scale, float(expected.alpha))


@pytest.mark.parametrize(
    "options", [{}, {"tlora_scale": "active", "decompose_both": True, "linear_dim": 1, "factor": 8}], ids=str
)
def test_file_loads_to_equal_output_and_an_identical_second_file(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model, adapter, file = trained_file(tmp_path, **options)
    other, x = denoiser(), torch.randn(2, 5, 24)
    loaded = load_adapter(other, file)
    assert loaded.tlora_config == adapter.tlora_config
    for timesteps in ((0, 400), (1000, 1000)):
        outputs = []
        for each, network in ((model, adapter), (other, loaded)):
            with torch.no_grad(), network.rank_mask_for(timesteps):
                outputs.append(each(x))
        assert torch.equal(*outputs)
    loaded.save(tmp_path / "second.safetensors", metadata={"model_family": "sdxl"})
    assert (tmp_path / "second.safetensors").read_bytes() == file.read_bytes()


def test_file_is_a_lokr_to_lycoris_with_a_schedule_beside_it(tmp_path: Path) -> None:
    layers = adapter_file.read(trained_file(tmp_path)[2]).layers
    parts = layers["lycoris_0_to_q"]
    assert set(parts) == {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha", "tlora_schedule"}
    named = {f"x.{key}": tensor for key, tensor in parts.items()}
    assert get_module(named, "x")[0] is TLokrLayer
    assert LokrModule.algo_check(named, "x")
    plain = make_module(LokrModule, LokrModule.extract_state_dict(named, "x"), "x", nn.Linear(24, 40))
    twin = TLokrLayer.make_module_from_state_dict(
        "x", nn.Linear(24, 40), *TLokrLayer.extract_state_dict(named, "x")
    )
    torch.testing.assert_close(plain.get_weight((40, 24)), twin.get_diff_weight()[0], rtol=0, atol=1e-6)
    del named["x.tlora_schedule"]
    assert get_module(named, "x")[0] is not TLokrLayer


def test_inspection_names_algorithm_rank_and_schedule(tmp_path: Path) -> None:
    found = inspect(trained_file(tmp_path)[2])
    assert (found.algorithm, found.ranks) == ("T-LoKr", {4: 2})
    assert found.schedule == RankSchedule(4).config()


@pytest.mark.parametrize(
    "shape", [{}, {"decompose_both": True, "linear_dim": 2, "factor": 8}], ids=["first whole", "first split"]
)
@pytest.mark.parametrize("scale", ["rank", "active"])
@pytest.mark.parametrize(
    ("chosen", "timestep"), [({"timestep": 600}, 600), ({"rank": 1}, 750), ({}, 0)], ids=str
)
def test_export_is_a_lokr_of_the_fixed_rank(
    tmp_path: Path, scale: str, chosen: dict[str, int], timestep: int, shape: dict[str, Any]
) -> None:
    model, adapter, file = trained_file(tmp_path, tlora_scale=scale, **shape)
    options = ExportOptions(layout="lycoris", **chosen)
    (written,) = export_adapter(file, tmp_path / "plain", options, families=registry.specs())
    parts = adapter_file.read(written.file).layers["lycoris_0_to_q"]
    assert "tlora_schedule" not in parts
    assert len(parts["lokr_w2_b"]) == adapter.schedule.rank_at(timestep)
    assert written.had_schedule
    other, x = denoiser(), torch.randn(1, 5, 24)
    loaded = load_adapter(other, written.file)
    assert loaded.tlora_config is None
    with torch.no_grad(), adapter.rank_mask_for([timestep]):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["rank", "active"])
def test_merge_folds_the_schedule_and_never_drops_it(tmp_path: Path, scale: str) -> None:
    _, adapter, file = trained_file(tmp_path, tlora_scale=scale)
    families = registry.specs()
    for options in ({}, {"rank": 24}):
        with pytest.raises(AdapterError, match="LoKr"):
            merge_adapters([file, file], tmp_path / "sum", MergeOptions(**options), families=families)
    with pytest.raises(AdapterError, match="rank schedule"):
        resize_adapter(file, tmp_path / "small", ResizeOptions(keep=Keep(rank=2)), families=families)
    folded = MergeOptions(weights=(0.5, 1.0), rank=24, timestep=600, layout="lycoris")
    base = BaseModel(family="sdxl", denoiser=denoiser().to("meta"))
    written = merge_adapters([file, file], tmp_path / "sum", folded, families=families, base=base)
    live = {layer.lora_name: layer for layer in adapter.lycoris_network.loras}
    for name, parts in adapter_file.read(written.file).layers.items():
        with adapter.rank_mask_for([600]):
            delta = 1.5 * live[name].get_diff_weight()[0].detach()
        found = parts["lora_up.weight"] @ parts["lora_down.weight"] * parts["alpha"] / 24
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-5)


def test_bands_state_their_largest_error(tmp_path: Path) -> None:
    _, adapter, file = trained_file(tmp_path, tlora_scale="active")
    options = ExportOptions(layout="lycoris", bands=2)
    exported = export_adapter(file, tmp_path / "band", options, families=registry.specs())
    worst, live = 0.0, {layer.lora_name: layer for layer in adapter.lycoris_network.loras}
    for name, parts in adapter_file.read(exported[0].file).layers.items():
        second = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        found = torch.kron(parts["lokr_w1"], second) * parts["alpha"] / len(parts["lokr_w2_b"])
        for timestep in range(0, 500, 10):
            with adapter.rank_mask_for([timestep]):
                delta = live[name].get_diff_weight()[0].detach()
            worst = max(worst, float((found - delta).norm() / delta.norm()))
    assert exported[0].band_error == pytest.approx(worst, rel=1e-3)
    assert json.loads(adapter_file.read(exported[0].file).metadata["timesteps"]) == [0, 499]


def test_training_state_and_init_lora_restore_the_factors(tmp_path: Path) -> None:
    model, adapter, file = trained_file(tmp_path)
    x, outputs = torch.randn(1, 5, 24), []
    for restore in (
        lambda other: other.load_state_dict(adapter.state_dict()),
        lambda other: other.init_from(file),
    ):
        twin = denoiser()
        other = attach(twin, TLOKR | {"apply_preset": {"target_module": ["Attention"]}}, seed=5)
        restore(other)
        with torch.no_grad(), other.rank_mask_for([300]):
            outputs.append(twin(x))
    with torch.no_grad(), adapter.rank_mask_for([300]):
        assert all(torch.equal(output, model(x)) for output in outputs)
    other = attach(denoiser(), TLOKR | {"linear_dim": 3, "apply_preset": {"target_module": ["Attention"]}})
    with pytest.raises(AdapterError, match="lokr_w2"):
        other.init_from(file)


def test_incomplete_file_is_refused(tmp_path: Path) -> None:
    _, _, file = trained_file(tmp_path)
    stored = adapter_file.read(file)
    kept = {key: tensor for key, tensor in stored.tensors.items() if key != "lycoris_0_to_q.lokr_w2_a"}
    adapter_file.write(tmp_path / "damaged.safetensors", kept, metadata=stored.metadata)
    with pytest.raises(AdapterError, match="lycoris_0_to_q"):
        load_adapter(denoiser(), tmp_path / "damaged.safetensors")


def test_given_schedule_replaces_that_of_the_file(tmp_path: Path) -> None:
    model, adapter, file = trained_file(tmp_path)
    other, x = denoiser(), torch.randn(1, 5, 24)
    loaded = load_adapter(other, file, schedule={"min_rank": 0.5, "scale": "active"})
    assert loaded.schedule == RankSchedule(4, min_rank=2, scale="active")
    # Two of four ranks at the highest noise, twice as strong.
    mask.set_mask(RankSchedule(4, min_rank=2, scale="active"), [1000], group=adapter.group)
    with torch.no_grad(), loaded.rank_mask_for([1000]):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-6)
    mask.clear_mask(adapter.group)
