"""The T-LoRA layer against the textbook formula, and every way of losing its mask or its base."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lycoris import create_lycoris_from_weights
from lycoris import wrapper as lycoris_wrapper
from lycoris.modules import MODULE_LIST, get_module
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.delta import ungrouped
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.lokr_layer import TLokrLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import INITS, TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import difference
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io import logs

RANK = 8
SCHEDULE = RankSchedule(RANK)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "conv1d": lambda: nn.Conv1d(8, 16, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1, dilation=2),
    "conv2d 1x1": lambda: nn.Conv2d(12, 16, 1),
    "conv2d grouped": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4),
}
INPUTS = {
    "linear": (3, 5, 24),
    "conv1d": (3, 8, 7),
    "conv2d": (3, 8, 9, 9),
    "conv2d 1x1": (3, 12, 6, 6),
    "conv2d grouped": (3, 16, 6, 6),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    logs.reset_log_once()


def adapt(layer: nn.Module, *, init: str = "random", trained: float = 0.0, **options: object) -> TLoraLayer:
    """Attach a T-LoRA layer; with `trained` its parameters have moved by that standard deviation."""
    options = {"schedule": SCHEDULE, "lora_dim": RANK, "alpha": RANK} | options
    adapter = TLoraLayer("lycoris_layer", layer, tlora_init=init, mask_group_id=mask.new_group(), **options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * trained)
    adapter.apply_to()
    return adapter


def run(adapter: TLoraLayer, layer: nn.Module, x: Tensor, *timesteps: int) -> Tensor:
    with mask.rank_mask(SCHEDULE, timesteps, group=adapter.mask_group_id):
        return layer(x)


def textbook_delta(adapter: TLoraLayer, x: Tensor, rank: int) -> Tensor:
    """P diag(lam m) Q x - P0 diag(lam0 m) Q0 x, written out in float64."""
    state = {key: value.detach().double() for key, value in adapter.custom_state_dict().items()}
    gate = (torch.arange(RANK) < rank).double()

    def path(q: Tensor, p: Tensor, values: Tensor) -> Tensor:
        if adapter.module_type == "linear":
            return ((x.double() @ q.T) * (values * gate)) @ p.flatten(1).T
        hidden = adapter.op(x.double(), q, None, **adapter.kw_dict)
        hidden = hidden * (values * gate).view(1, -1, *(1,) * (hidden.ndim - 2))
        return adapter.op(hidden, p)

    if adapter.is_vanilla:
        return path(state["lora_down.weight"], state["lora_up.weight"], torch.ones(RANK))
    trained = path(state["q_layer.weight"], state["p_layer.weight"], state["lambda_layer"].flatten())
    return trained - path(state["base_q"], state["base_p"], state["base_lambda"].flatten())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("timestep", [0, 400, 1000])
def test_output_equals_the_textbook_formula(kind: str, init: str, timestep: int) -> None:
    layer, x = LAYERS[kind](), torch.randn(INPUTS[kind])
    expected = layer(x).double()
    adapter = adapt(layer, init=init, trained=0.05)
    adapter.multiplier, adapter.scale = 0.5, 0.25
    expected = expected + 0.125 * textbook_delta(adapter, x, SCHEDULE.rank_at(timestep))
    torch.testing.assert_close(run(adapter, layer, x, timestep).double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_of_timesteps_equals_one_run_per_sample(kind: str, init: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(INPUTS[kind])
    adapter = adapt(layer, init=init, trained=0.2)
    timesteps = (0, 500, 1000)
    singles = torch.cat([run(adapter, layer, x[i : i + 1], t) for i, t in enumerate(timesteps)])
    torch.testing.assert_close(run(adapter, layer, x, *timesteps), singles, rtol=0, atol=3e-6)
    assert not torch.allclose(run(adapter, layer, x, 500), singles, atol=1e-3), "the mask has no effect here"


@pytest.mark.parametrize("shape", [(8, 24), (8, 8, 24), (5, 8, 24), (8, 2, 8, 24)])
def test_batch_masks_samples_and_not_tokens_whatever_the_shape(shape: tuple[int, ...]) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(shape)
    adapter = adapt(layer, trained=0.2)
    timesteps = [int(t) for t in torch.linspace(0, 1000, shape[0])]
    singles = torch.cat([run(adapter, layer, x[i : i + 1], t) for i, t in enumerate(timesteps)])
    torch.testing.assert_close(run(adapter, layer, x, *timesteps), singles, rtol=0, atol=3e-6)


def test_one_timestep_masks_a_guidance_doubled_batch() -> None:
    layer, x = nn.Linear(24, 40), torch.randn(4, 5, 24)
    adapter = adapt(layer, trained=0.2)
    halves = torch.cat([run(adapter, layer, half, 600) for half in x.chunk(2)])
    torch.testing.assert_close(run(adapter, layer, x, 600), halves, rtol=0, atol=3e-6)


def test_mask_of_another_batch_size_is_refused() -> None:
    layer = nn.Linear(24, 40)
    adapter = adapt(layer)
    with pytest.raises(RuntimeError, match=r"\b2 samples.*\b3\b"):
        run(adapter, layer, torch.randn(3, 5, 24), 0, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_delta_is_exactly_zero_at_the_start(kind: str, init: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[kind]().to(dtype), torch.randn(INPUTS[kind], dtype=dtype)
    expected = layer(x)
    adapter = adapt(layer, init=init)
    for timestep in (0, 250, 500, 999, 1000):
        assert torch.equal(run(adapter, layer, x, timestep), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("size", [7.6e-4, 7.7e-3, 7.6e-2])
def test_bf16_base_keeps_the_delta_within_half_a_percent(size: float, autocast: bool) -> None:
    layer = nn.Linear(128, 128, bias=False).to(torch.bfloat16)
    adapter = adapt(layer, init="weight", trained=1e-3, sig_type="principal")
    with torch.no_grad():
        adapter.multiplier = size * float(layer.weight.float().norm() / adapter.delta_norm())
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    expected = textbook_delta(adapter, x, RANK) * adapter.multiplier
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
        mask.rank_mask(SCHEDULE, [0], group=adapter.mask_group_id),
    ):
        found = adapter(x, torch.zeros(64, 128, dtype=torch.bfloat16))
    assert (found.double() - expected).norm() / expected.norm() < 0.005


def test_float32_parameters_survive_a_cast_of_the_model() -> None:
    layer = nn.Linear(24, 40)
    adapter = adapt(layer, trained=0.1)
    before = adapter.delta_q.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(adapter.delta_q, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_checkpointed_gradients_equal_plain_ones_while_the_mask_is_held(init: str, reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        layers = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
        adapters = [adapt(layer, init=init, trained=0.1) for layer in layers]
        x = torch.randn(2, 5, 24, requires_grad=True)
        for adapter in adapters:
            adapter.set_group(adapters[0].mask_group_id)
        with mask.rank_mask(SCHEDULE, [300, 900], group=adapters[0].mask_group_id):
            y = checkpoint(layers, x, use_reentrant=reentrant) if checkpointed else layers(x)
            y.square().sum().backward()
        gradients.append([p.grad for adapter in adapters for p in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_closed_ranks_get_no_gradient() -> None:
    layer = nn.Linear(24, 40)
    adapter = adapt(layer, trained=0.1)
    with mask.rank_mask(SCHEDULE, [500, 750], group=adapter.mask_group_id):  # ranks 4 and 2
        layer(torch.randn(2, 5, 24)).square().sum().backward()
    assert adapter.delta_q.grad[:4].abs().sum() > 0
    assert adapter.delta_q.grad[4:].abs().sum() == 0
    assert adapter.delta_p.grad[:, 4:].abs().sum() == 0
    assert adapter.delta_lambda.grad[4:].abs().sum() == 0


def test_training_without_a_mask_raises_and_sampling_without_one_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = nn.Linear(24, 40)
    adapt(layer)
    with pytest.raises(RuntimeError, match=r"lycoris_layer.*apply_tlora_timestep_mask"):
        layer(torch.randn(2, 24))
    layer.eval()
    with caplog.at_level(logging.WARNING):
        layer(torch.randn(2, 24))
        layer(torch.randn(2, 24))
    assert caplog.text.count("_tlora_config") == 1


def test_mask_of_another_nominal_rank_is_refused_naming_both() -> None:
    layer = nn.Linear(24, 40)
    adapter = adapt(layer)
    with (
        pytest.raises(AdapterError, match=r"max_rank 16\b.*\b8\b"),
        mask.rank_mask(RankSchedule(16), [5], group=adapter.mask_group_id),
    ):
        layer(torch.randn(2, 24))


def test_strength_zero_gives_the_base_bit_for_bit() -> None:
    layer, x = nn.Linear(24, 40), torch.randn(2, 24)
    expected = layer(x)
    adapter = adapt(layer, trained=0.5)
    adapter.multiplier = 0.0
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_restore_leaves_the_layer_as_it_was(kind: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(INPUTS[kind])
    expected, keys = layer(x), set(vars(layer))
    adapter = adapt(layer, trained=0.5)
    adapter.apply_to()  # a second call changes nothing
    assert len(list(layer.children())) == 1
    adapter.restore()
    assert torch.equal(layer(x), expected)
    assert not list(layer.children())
    assert set(vars(layer)) == keys
    assert not layer._forward_hooks
    assert not layer._state_dict_hooks


def test_adapter_is_reachable_but_stays_out_of_the_base_state_dict() -> None:
    layer = nn.Linear(24, 40)
    keys = set(layer.state_dict())
    weights = copy.deepcopy(layer.state_dict())
    adapter = adapt(layer, trained=0.1)
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in layer.parameters()}
    assert set(layer.state_dict()) == keys
    assert set(nn.Sequential(layer).state_dict()) == {f"0.{key}" for key in keys}
    layer.load_state_dict(weights, strict=True)


def test_copy_of_an_adapted_layer_is_independent() -> None:
    layer, x = nn.Linear(24, 40).eval(), torch.randn(2, 24)
    adapter = adapt(layer, trained=0.1)
    twin = copy.deepcopy(layer)
    expected = run(adapter, layer, x, 0)
    with torch.no_grad():
        adapter.delta_p.zero_()
        adapter.delta_q.zero_()
        adapter.delta_lambda.zero_()
    torch.testing.assert_close(run(adapter, twin, x, 0), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.reliability_row(11)
def test_saved_layer_reloads_to_equal_output_and_an_identical_second_file(kind: str, init: str) -> None:
    layer, x = LAYERS[kind](), torch.randn(INPUTS[kind])
    twin = copy.deepcopy(layer)
    adapter = adapt(layer, init=init, trained=0.05, sig_type="last", alpha=4.0)
    file = {
        f"lycoris_layer.{key}": value.detach().clone() for key, value in adapter.custom_state_dict().items()
    }
    kind_of_file, weights = get_module(file, "lycoris_layer")
    assert kind_of_file is TLoraLayer
    loaded = TLoraLayer.make_module_from_state_dict("lycoris_layer", twin, *weights)
    assert (loaded.spec, loaded.scale) == (TLoraSpec(init, "last", SCHEDULE), 0.5)
    loaded.set_group(adapter.mask_group_id)
    loaded.apply_to()
    for timestep in (0, 500, 1000):
        torch.testing.assert_close(
            run(adapter, twin, x, timestep), run(adapter, layer, x, timestep), rtol=0, atol=1e-6
        )
    second = loaded.custom_state_dict()
    assert all(torch.equal(second[key.removeprefix("lycoris_layer.")], value) for key, value in file.items())


def test_difference_gives_the_total_back_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(100_000, generator=generator)
    total = base + torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-8, 2, (100_000,))
    assert torch.equal(base + difference(total, base), total)


def test_stock_file_without_base_factors_loads_as_weight_principal_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = nn.Linear(24, 40)
    twin = copy.deepcopy(layer)
    adapter = adapt(layer, init="weight", sig_type="principal", trained=0.05)
    state = adapter.custom_state_dict()
    stock = [
        None if key.startswith("base") or key == "tlora_schedule" else state.get(key)
        for key in TLoraLayer.weight_list
    ]
    with caplog.at_level(logging.WARNING):
        loaded = TLoraLayer.make_module_from_state_dict("lycoris_layer", twin, *stock)
    assert "weight/principal" in caplog.text
    loaded.apply_to()
    loaded.set_group(adapter.mask_group_id)
    x = torch.randn(2, 24)
    torch.testing.assert_close(run(adapter, twin, x, 0), run(adapter, layer, x, 0), rtol=0, atol=2e-6)


def test_network_from_lycoris_own_loader_stays_live_after_merge_to() -> None:
    model = nn.Sequential(nn.Linear(24, 24)).eval()
    trained = copy.deepcopy(model)
    adapter = adapt(trained[0], trained=0.2)
    file = {f"lycoris_0.{key}": value.detach().clone() for key, value in adapter.custom_state_dict().items()}
    weight = model[0].weight.clone()
    network, _ = create_lycoris_from_weights(1.0, "", model, weights_sd=file)
    network.merge_to()
    assert torch.equal(model[0].weight, weight)
    x = torch.randn(2, 24)
    for timestep in (0, 700):
        mask.set_mask(SCHEDULE, [timestep])
        found = model(x)
        mask.clear_mask()
        torch.testing.assert_close(found, run(adapter, trained, x, timestep), rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_max_norm_bounds_the_delta_itself(init: str) -> None:
    layer = nn.Linear(24, 40)
    adapter = adapt(layer.eval(), init=init, trained=0.2)
    scaled, norm = adapter.apply_max_norm(0.05)
    assert scaled
    assert float(adapter.get_diff_weight()[0].detach().norm()) == pytest.approx(0.05, rel=1e-3)
    assert norm <= 0.05
    assert adapter.apply_max_norm(0.05)[0] is False


@pytest.mark.parametrize("init", INITS)
def test_weight_decay_without_gradients_leaves_the_delta_at_zero(init: str) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(2, 24)
    expected = layer(x)
    adapter = adapt(layer, init=init)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(1000):
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(run(adapter, layer, x, 0), expected)


def test_rank_above_the_layer_is_refused_naming_both() -> None:
    with pytest.raises(ConfigError, match=r"rank 32\b.*\b24\b"):
        TLoraLayer("lycoris_layer", nn.Linear(24, 40), 1.0, 32)


def test_layer_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="LayerNorm"):
        TLoraLayer("lycoris_layer", nn.LayerNorm(4))


def test_file_of_a_newer_version_or_with_a_bad_schedule_is_refused() -> None:
    adapter = adapt(nn.Linear(24, 40))
    state = adapter.custom_state_dict()
    for index, value in ((0, 99.0), (3, 500.0), (6, 7.0)):
        stored = state["tlora_schedule"].clone()
        stored[index] = value
        with pytest.raises(AdapterError, match="tlora_schedule"):
            TLoraSpec.read(stored)


def test_layer_takes_the_place_of_lycoris_own() -> None:
    assert MODULE_LIST[:2] == [TLokrLayer, TLoraLayer]
    assert TLoraModule not in MODULE_LIST
    assert MODULE_LIST.count(TLoraLayer) == 1
    assert lycoris_wrapper.network_module_dict["tlora"] is TLoraLayer
    assert lycoris_wrapper.network_module_dict["tlokr"] is TLokrLayer


def test_grouped_convolution_has_no_dense_delta_and_needs_a_rank_that_its_groups_divide() -> None:
    layer = LAYERS["conv2d grouped"]().eval()
    adapter = adapt(layer, trained=0.1)
    with pytest.raises(AdapterError, match="lycoris_layer"):
        adapter.get_diff_weight()
    with pytest.raises(ConfigError, match=r"rank 6\b.*\b4 groups"):
        TLoraLayer("lycoris_layer", layer, 1.0, 6)


def test_ungrouped_factor_convolves_like_the_grouped_one() -> None:
    x, a = torch.randn(2, 16, 5, 5), torch.randn(2 * RANK, 4, 3, 3)
    halves = [torch.nn.functional.conv2d(x, half, groups=4) for half in a.chunk(2)]
    whole = torch.nn.functional.conv2d(x, ungrouped(a, groups=4, rank=RANK))
    torch.testing.assert_close(whole, torch.cat(halves, dim=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("timesteps", [(100,), (700,), (100, 700, 950)], ids=str)
def test_ranks_of_a_scaled_schedule_count_by_their_gain(
    kind: str, init: str, timesteps: tuple[int, ...]
) -> None:
    layer = LAYERS[kind]().eval()
    schedule = RankSchedule(RANK, variant="cosine")
    adapter = adapt(layer, init=init, trained=0.1, schedule=schedule)
    x = torch.randn(INPUTS[kind])
    with torch.no_grad(), mask.rank_mask(schedule, timesteps, group=adapter.mask_group_id):
        result = layer(x)
        dense = None if kind == "conv2d grouped" else adapter.get_diff_weight()[0]
    adapter.restore()
    with torch.no_grad():
        base = layer(x).double()
        for row, timestep in enumerate(timesteps if len(timesteps) > 1 else timesteps * len(x)):
            rank = schedule.rank_at(timestep)
            expected = textbook_delta(adapter, x[row : row + 1], rank) * (RANK / rank)
            error = (result[row : row + 1].double() - base[row : row + 1] - expected).norm() / expected.norm()
            assert error < 1e-4
        if dense is not None and adapter.module_type == "linear":
            first = textbook_delta(adapter, x, schedule.rank_at(timesteps[0])) * (
                RANK / schedule.rank_at(timesteps[0])
            )
            torch.testing.assert_close(
                torch.nn.functional.linear(x, dense).double(), first, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("values", [{"variant": "linear"}, {"scale": "active"}], ids=str)
@pytest.mark.parametrize("own", [{}, {"tlora_min_rank": 3, "tlora_alpha": 2.0}], ids=str)
def test_compiled_layer_has_its_own_ranks_and_their_gain_in_one_graph(
    values: dict[str, Any], own: dict[str, float]
) -> None:
    layer = nn.Linear(24, 40).eval()
    schedule = RankSchedule(RANK, **values)
    own = {key: value for key, value in own.items() if schedule.variant == "floor"}
    adapter = adapt(layer, init="vanilla", trained=0.1, schedule=schedule, **own)
    counter = CompileCounter()
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.randn(3, 5, 24)
    with torch.no_grad():
        for timestep in (200, 700, 900):
            with mask.rank_mask(schedule, [timestep], group=adapter.mask_group_id):
                torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_layer_of_another_rank_has_its_own_gain() -> None:
    layer, schedule = nn.Linear(24, 40).eval(), RankSchedule(16, variant="cosine")
    adapter = adapt(layer, init="vanilla", trained=0.1, schedule=schedule)
    own, x = schedule.for_rank(RANK), torch.randn(3, 5, 24)
    with torch.no_grad(), mask.rank_mask(schedule, [600], group=adapter.mask_group_id):
        result = layer(x)
    adapter.restore()
    expected = textbook_delta(adapter, x, own.rank_at(600)) * own.gain_at(own.rank_at(600))
    with torch.no_grad():
        torch.testing.assert_close(result.double(), layer(x).double() + expected, rtol=1e-5, atol=1e-5)
