"""Share of the rank, scale by the active rank, and layers with values of their own: trained, stored, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.pipeline import schedules_of
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.lycoris import (
    apply_tlora_inference_mask,
    apply_tlora_timestep_mask,
    clear_tlora_mask,
)
from tests.unit.adapters.attaching import TLORA, attach

TIMESTEPS = (0, 130, 600, 1000)
ENTRIES: dict[str, dict[str, Any]] = {"FeedForward": {"dim": 4}}
OWN = {"FeedForward": {"dim": 4, "tlora_min_rank": 1, "tlora_alpha": 2.0}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_q(x)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(24, 32)
        self.out = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.proj(x)))


class Denoiser(nn.Module):
    """Class names are what targets name; a forward in float64 gives the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x))


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().requires_grad_(False).eval()


def trained(model: nn.Module, entries: dict[str, dict[str, Any]] | None = None, **options: Any) -> Any:
    """An adapter of rank 8, whose parameters have moved."""
    preset = {"target_module": ["Attention", "FeedForward"], "module_algo_map": entries or {}}
    adapter = attach(model, TLORA | {"apply_preset": preset} | options)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def saved(folder: Path, adapter: LycorisAdapter) -> Path:
    file = folder / "adapter.safetensors"
    adapter.save(file, metadata={"model_family": "sdxl"})
    return file


def predict(model: nn.Module, adapter: LycorisAdapter, x: Tensor, *timesteps: int) -> Tensor:
    with torch.no_grad(), adapter.rank_mask_for(timesteps):
        return model(x)


def active_rank(timestep: int, *, rank: int, min_rank: int, alpha: float) -> int:
    return min(rank, int(((1000 - timestep) / 1000) ** alpha * (rank - min_rank)) + min_rank)


def reference(file: Path, x: Tensor, timestep: int, values: dict[str, tuple[int, float, bool]]) -> Tensor:
    """The output in float64 with dense deltas, from a file's factors.

    Args:
        file: An adapter file.
        x: One sample.
        timestep: Of that sample.
        values: Part of a layer's name -> its min_rank, alpha, and whether its scale is active.
    """
    model, tensors = denoiser().double(), load_file(file)
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        name = adapter_file.layer_name(path)
        part = {key.partition(".")[2]: t.double() for key, t in tensors.items() if key.startswith(f"{name}.")}
        min_rank, alpha, is_scaled = next(value for key, value in values.items() if key in path)
        rank = len(part["q_layer.weight"])
        active = active_rank(timestep, rank=rank, min_rank=min_rank, alpha=alpha)
        gate = (torch.arange(rank) < active).double()
        trained = part["p_layer.weight"] @ torch.diag(part["lambda_layer"][0] * gate) @ part["q_layer.weight"]
        base = part["base_p"] @ torch.diag(part["base_lambda"][0] * gate) @ part["base_q"]
        factor = float(part["alpha"]) / rank * (rank / active if is_scaled else 1)
        with torch.no_grad():
            layer.weight += (trained - base) * factor
    with torch.no_grad():
        return model(x.double())


CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, float, bool]]]] = {
    # floor(0.6 * 8) is 4; of the layers of rank 4 it is 2, where min(4, 4) would be 4.
    "share": (
        {"tlora_min_rank": 0.6, "entries": ENTRIES},
        {"to_q": (4, 1.0, False), "feed": (2, 1.0, False)},
    ),
    "rank": ({"tlora_min_rank": 5, "entries": ENTRIES}, {"to_q": (5, 1.0, False), "feed": (4, 1.0, False)}),
    "scale": (
        {"tlora_scale": "active", "entries": ENTRIES},
        {"to_q": (2, 1.0, True), "feed": (2, 1.0, True)},
    ),
    "own": ({"entries": OWN}, {"to_q": (2, 1.0, False), "feed": (1, 2.0, False)}),
    "own share": (
        {"entries": {"FeedForward": {"tlora_min_rank": 0.75}}},
        {"to_q": (2, 1.0, False), "feed": (6, 1.0, False)},
    ),
    "own, scaled": (
        {"entries": OWN, "tlora_scale": "active", "tlora_alpha": 0.5},
        {"to_q": (2, 0.5, True), "feed": (1, 2.0, True)},
    ),
}
cases = pytest.mark.parametrize(("options", "values"), CASES.values(), ids=CASES)


@cases
def test_output_is_that_of_dense_deltas_in_float64_before_and_after_a_reload(
    tmp_path: Path, options: dict[str, Any], values: dict[str, tuple[int, float, bool]]
) -> None:
    model, x = denoiser(), torch.randn(len(TIMESTEPS), 5, 24)
    adapter = trained(model, **options)
    file = saved(tmp_path, adapter)
    expected = torch.cat([reference(file, x[i : i + 1], t, values) for i, t in enumerate(TIMESTEPS)])
    torch.testing.assert_close(predict(model, adapter, x, *TIMESTEPS).double(), expected, rtol=0, atol=2e-5)
    for row, timestep in enumerate(TIMESTEPS):  # one timestep slices to its rank
        single = predict(model, adapter, x[row : row + 1], timestep)
        torch.testing.assert_close(single.double(), expected[row : row + 1], rtol=0, atol=2e-5)
    other = denoiser()
    loaded = load_adapter(other, file)
    assert loaded.tlora_config == adapter.tlora_config
    found = predict(other, loaded, x, *TIMESTEPS)
    torch.testing.assert_close(found, predict(model, adapter, x, *TIMESTEPS), rtol=0, atol=2e-6)
    loaded.save(tmp_path / "second.safetensors", metadata={"model_family": "sdxl"})
    assert (tmp_path / "second.safetensors").read_bytes() == file.read_bytes()


@cases
@pytest.mark.parametrize("timesteps", [(130, 600), (600, 600)], ids=str)  # the second slices to its rank
def test_gradients_are_those_of_the_formula_and_closed_ranks_have_none(
    options: dict[str, Any], values: dict[str, tuple[int, float, bool]], timesteps: tuple[int, int]
) -> None:
    model, x = denoiser().train(), torch.randn(2, 5, 24)
    adapter = trained(model, **options)
    with adapter.rank_mask_for(timesteps):
        model(x).square().sum().backward()
    for layer in adapter.lycoris_network.loras:
        min_rank, alpha, is_scaled = next(value for key, value in values.items() if key in layer.lora_name)
        ranks = [active_rank(t, rank=layer.lora_dim, min_rank=min_rank, alpha=alpha) for t in timesteps]
        assert layer.delta_q.grad[: max(ranks)].abs().sum() > 0
        assert layer.delta_q.grad[max(ranks) :].abs().sum() == 0
        assert layer.delta_p.grad[:, max(ranks) :].abs().sum() == 0
    # The last layer's gradients by autograd in float64, sample by sample, from the formula.
    inputs, y = _last_layer(adapter, model, x, timesteps)
    own = {key: each.detach().double().requires_grad_() for key, each in layer.named_parameters()}
    for row in (0, 1):
        gain = layer.lora_dim / ranks[row] if is_scaled else 1.0
        gate = (torch.arange(layer.lora_dim) < ranks[row]).double() * gain * layer.scale
        values = (layer.base_lambda.double() + own["delta_lambda"]) * gate
        hidden = inputs[row] @ (layer.base_q.double() + own["delta_q"]).T * values
        ((hidden @ (layer.base_p.double() + own["delta_p"]).T) * 2 * y[row]).sum().backward()
    for key, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), own[key].grad, rtol=1e-4, atol=1e-3)


def _last_layer(adapter: Any, model: Any, x: Tensor, timesteps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The input of the last layer, and the model's output."""
    seen: list[Tensor] = []
    assert "feed_forward_out" in adapter.lycoris_network.loras[-1].lora_name
    hook = model.feed_forward.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = predict(model, adapter, x, *timesteps)
    hook.remove()
    return seen[0].double(), y.double()


def test_share_is_stored_in_ranks_that_every_reader_understands(tmp_path: Path) -> None:
    tensors, plain = {}, {}
    for name, min_rank in (("share", 0.5), ("rank", 4)):
        folder = tmp_path / name
        folder.mkdir()
        file = saved(folder, trained(denoiser(), tlora_min_rank=min_rank))
        stored = adapter_file.read(file)
        tensors[name], plain[name] = file.read_bytes(), stored
    assert tensors["share"] == tensors["rank"]
    config = plain["share"].entry(adapter_file.SCHEDULE_KEY)
    assert config == RankSchedule(8, min_rank=4).config()
    assert plain["share"].entry(adapter_file.LYCORIS_KEY)["tlora_min_rank"] == 4


def test_options_of_the_default_leave_no_trace_in_the_file(tmp_path: Path) -> None:
    entries = {"FeedForward": {"tlora_min_rank": 2, "tlora_alpha": 1.0}}  # the network's own
    stored = adapter_file.read(saved(tmp_path, trained(denoiser(), entries)))
    assert "scale" not in stored.entry(adapter_file.SCHEDULE_KEY)
    schedules = [each for key, each in stored.tensors.items() if key.endswith("tlora_schedule")]
    assert {(len(each), float(each[0])) for each in schedules} == {(9, 1.0)}


def test_mean_active_rank_weighs_the_layers_once_one_has_its_own_values() -> None:
    same = trained(denoiser(), ENTRIES)
    assert same.mean_active_rank([0, 1000]) == (8 + 2) / 2
    own = trained(denoiser(), OWN)  # one layer of rank 8, two of rank 4
    assert own.mean_active_rank([0, 1000]) == pytest.approx(((8 + 2) / 2 + 2 * (4 + 1) / 2) / 3)


@pytest.mark.parametrize("name", ["scale", "own, scaled"])
def test_lycoris_loader_and_the_public_functions_follow_the_file(tmp_path: Path, name: str) -> None:
    options, values = CASES[name]
    file, x = saved(tmp_path, trained(denoiser(), **options)), torch.randn(2, 5, 24)
    model, alpha = denoiser(), options.get("tlora_alpha", 1.0)
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    network.merge_to()
    expected = torch.cat([reference(file, x[i : i + 1], t, values) for i, t in enumerate((130, 600))])
    apply_tlora_timestep_mask([130, 600], 1000, 8, 2, alpha)
    with torch.no_grad():
        found = model(x)
    clear_tlora_mask()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    apply_tlora_inference_mask(600, 1000, 8, 2, alpha)
    with torch.no_grad():
        found = model(x[1:])
    clear_tlora_mask()
    torch.testing.assert_close(found.double(), expected[1:], rtol=0, atol=2e-5)


def test_pipeline_config_keeps_what_it_does_not_state(tmp_path: Path) -> None:
    options, values = CASES["own, scaled"]
    file, x = saved(tmp_path, trained(denoiser(), **options)), torch.randn(1, 5, 24)
    model, scheduler = denoiser(), _Scheduler()
    adapter = load_adapter(model, file)
    schedules = schedules_of(model, config={"max_rank": 8}, scheduler=scheduler)
    assert schedules == {adapter.group: RankSchedule(8, min_rank=2, alpha=0.5, scale="active")}
    mask.set_mask(schedules[adapter.group], [600], group=adapter.group)
    with torch.no_grad():
        found = model(x)
    mask.clear_mask(adapter.group)
    torch.testing.assert_close(found.double(), reference(file, x, 600, values), rtol=0, atol=2e-5)
    asked = {"max_rank": 8, "scale": "rank"}
    assert schedules_of(model, config=asked, scheduler=scheduler)[adapter.group].scale == "rank"


class _Scheduler:
    class config:
        num_train_timesteps = 1000


@pytest.mark.parametrize("name", ["share", "scale", "own", "own, scaled"])
@pytest.mark.parametrize("timestep", [130, 600])
def test_export_at_a_timestep_is_the_live_adapter_there(tmp_path: Path, name: str, timestep: int) -> None:
    options, values = CASES[name]
    file, x = saved(tmp_path, trained(denoiser(), **options)), torch.randn(1, 5, 24)
    export = ExportOptions(layout="lycoris", timestep=timestep)
    (written,) = export_adapter(file, tmp_path / "plain", export, families=registry.specs())
    assert max(written.errors.values()) < 1e-6
    assert adapter_file.SCHEDULE_KEY not in adapter_file.read(written.file).metadata
    model = denoiser()
    load_adapter(model, written.file)
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found.double(), reference(file, x, timestep, values), rtol=0, atol=3e-5)


def test_bands_count_the_error_of_each_layers_own_schedule(tmp_path: Path) -> None:
    file = saved(tmp_path, trained(denoiser(), OWN, tlora_scale="active"))
    source = adapter_file.read(file)
    export = ExportOptions(layout="lycoris", bands=2)
    first, _ = export_adapter(file, tmp_path / "band", export, families=registry.specs())
    written = adapter_file.read(first.file).layers
    worst = 0.0
    for name, parts in source.layers.items():
        part = {key: tensor.double() for key, tensor in parts.items()}
        rank = len(part["q_layer.weight"])
        min_rank, alpha = (1, 2.0) if "feed" in name else (2, 1.0)
        up, down = written[name]["lora_up.weight"].double(), written[name]["lora_down.weight"].double()
        found = float(written[name]["alpha"]) / len(down) * up @ down
        for active in {active_rank(t, rank=rank, min_rank=min_rank, alpha=alpha) for t in range(500)}:
            gate = torch.diag((torch.arange(rank) < active).double()) * float(part["alpha"]) / active
            live = part["p_layer.weight"] * part["lambda_layer"] @ gate @ part["q_layer.weight"]
            live -= part["base_p"] * part["base_lambda"] @ gate @ part["base_q"]
            worst = max(worst, float((found - live).norm() / live.norm()))
    assert first.band_error == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ({"min_rank": 3}, {"to_q": (3, 0.5, True), "feed": (3, 2.0, True)}),
        ({"min_rank": 0.75}, {"to_q": (6, 0.5, True), "feed": (3, 2.0, True)}),
        ({"alpha": 1.0}, {"to_q": (2, 1.0, True), "feed": (1, 1.0, True)}),
        ({"scale": "rank"}, {"to_q": (2, 0.5, False), "feed": (1, 2.0, False)}),
    ],
    ids=str,
)
def test_given_values_replace_those_of_the_file_and_of_its_layers(
    tmp_path: Path, given: dict[str, Any], values: dict[str, tuple[int, float, bool]]
) -> None:
    file = saved(tmp_path, trained(denoiser(), **CASES["own, scaled"][0]))
    model, x = denoiser(), torch.randn(1, 5, 24)
    adapter = load_adapter(model, file, schedule=given)
    for timestep in (600, 1000):
        found = predict(model, adapter, x, timestep)
        torch.testing.assert_close(found.double(), reference(file, x, timestep, values), rtol=0, atol=3e-5)


def test_given_scale_is_that_of_a_file_whose_header_does_not_state_it(tmp_path: Path) -> None:
    file = saved(tmp_path, trained(denoiser()))
    model, x = denoiser(), torch.randn(1, 5, 24)
    adapter = load_adapter(model, file, schedule={"scale": "active"})
    values = {"": (2, 1.0, True)}
    found = predict(model, adapter, x, 600)
    torch.testing.assert_close(found.double(), reference(file, x, 600, values), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    "given", [{"min_rank": 0}, {"min_rank": 1.0}, {"min_rank": 9}, {"scale": "alpha"}], ids=str
)
def test_given_value_outside_its_range_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    file = saved(tmp_path, trained(denoiser()))
    with pytest.raises(AdapterError, match="schedule"):
        load_adapter(denoiser(), file, schedule=given)


def test_run_keeps_its_own_values_when_it_begins_from_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = saved(tmp_path, trained(denoiser(), OWN))
    model = denoiser()
    adapter = trained(model, ENTRIES)
    adapter.init_from(file)
    assert "tlora_min_rank" in caplog.text
    layers = adapter.lycoris_network.loras
    assert {each.own for layer in layers for each in (layer.ranks, layer.spec)} == {(None, None)}
    values, x = {"": (2, 1.0, False)}, torch.randn(1, 5, 24)
    found = predict(model, adapter, x, 600)
    torch.testing.assert_close(found.double(), reference(file, x, 600, values), rtol=0, atol=2e-5)


def test_inspection_names_the_schedules_of_layers_that_have_their_own(tmp_path: Path) -> None:
    found = inspect(saved(tmp_path, trained(denoiser(), OWN, tlora_scale="active")))
    assert found.schedule is not None
    assert found.schedule["scale"] == "active"
    assert found.own_schedules == {"rank 4, min_rank 1, alpha 2": 2}
    assert "rank 4, min_rank 1, alpha 2 (2)" in found.text()
    assert inspect(saved(tmp_path, trained(denoiser(), ENTRIES))).own_schedules == {}
