"""Best approximations of a low rank, and the dense deltas of LoHa and LoKr, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.lora_conversion import lora_layer, truncated_product
from simpletuner.helpers.adapters.files.low_rank import Keep, dense_delta, low_rank_layer, truncated_dense
from simpletuner.helpers.adapters.files.resizing import ResizeOptions, resize_adapter
from simpletuner.helpers.adapters.files.rewriting import Rewritten
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.models import registry
from tests.unit.adapters.files.foreign.makers import LAYERS, Made, effect_error, loha, lora, make, own_file
from tests.unit.adapters.files.test_merging import KOHYA, base_of, stored_delta

FAMILIES = registry.specs()
VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
every_family = pytest.mark.parametrize("family", LAYERS)


def with_values(rows: int, columns: int) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, 5, generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return left * VALUES @ right.T


# Squares are 64, 16, 4, 1 and 0.25 of 85.25.
@pytest.mark.parametrize(
    ("keep", "rank"),
    [
        (Keep(rank=3), 3),
        (Keep(rank=99), 5),
        (Keep(), 5),
        (Keep(energy=0.75), 1),
        (Keep(energy=0.76), 2),
        (Keep(energy=0.93), 2),
        (Keep(energy=0.94), 3),
        (Keep(energy=80 / 85.25), 2),
        (Keep(energy=0.9999), 5),
        (Keep(energy=0.01), 1),
    ],
    ids=str,
)
def test_rank_that_is_kept_for_singular_values(keep: Keep, rank: int) -> None:
    assert keep.choose(VALUES) == rank


@pytest.mark.parametrize(
    "keep",
    [Keep(rank=0), Keep(energy=0.0), Keep(energy=1.0), Keep(energy=float("nan")), Keep(rank=2, energy=0.5)],
    ids=str,
)
def test_values_outside_their_range_are_refused(keep: Keep) -> None:
    with pytest.raises(AdapterError):
        keep.refuse_invalid()


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 6, 2, 2)], ids=str)
@pytest.mark.parametrize("keep", [Keep(rank=2), Keep(energy=0.94), Keep(rank=99)], ids=str)
def test_dense_matrix_is_cut_to_its_largest_singular_values_in_their_order(
    shape: tuple[int, ...], keep: Keep
) -> None:
    matrix = with_values(shape[0], int(torch.tensor(shape[1:]).prod()))
    down, up = truncated_dense(matrix.view(shape), keep)
    rank = 16 if keep.rank == 99 else keep.choose(VALUES)
    assert down.shape == (rank, *shape[1:])
    expected = torch.linalg.svdvals(matrix)[rank:].norm()
    assert float((matrix - up @ down.flatten(1)).norm()) == pytest.approx(float(expected), abs=1e-7)
    norms = (down.flatten(1).norm(dim=1) * up.norm(dim=0))[:5]
    torch.testing.assert_close(norms, VALUES[: len(norms)], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(down.flatten(1).norm(dim=1)[:5], up.norm(dim=0)[:5])


def test_product_is_cut_to_its_largest_singular_values_in_their_order() -> None:
    matrix = with_values(16, 24)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    u, values, vh = torch.linalg.svd(matrix)
    a, b = torch.linalg.solve(mixing, vh[:5]), u[:, :5] * values[:5] @ mixing
    down, up = truncated_product(a, b, Keep(rank=3).choose)
    torch.testing.assert_close(down.norm(dim=1) * up.norm(dim=0), VALUES[:3])
    assert float((matrix - up @ down).norm()) == pytest.approx(float(VALUES[3:].norm()), rel=1e-9)


def test_delta_of_zero_is_a_layer_of_zeros() -> None:
    layer = low_rank_layer("x", torch.zeros(6, 4), keep=Keep(rank=2), dtype=torch.float32)
    assert layer.error == layer.norm == 0
    assert torch.isfinite(layer.down).all()
    assert torch.isfinite(layer.up).all()
    assert not (layer.up @ layer.down).any()


def test_scale_of_a_low_rank_layer_is_its_alpha_over_its_rank() -> None:
    matrix = with_values(16, 24)
    layer = low_rank_layer("x", matrix, keep=Keep(rank=5), dtype=torch.float32, scale=4.0)
    assert layer.alpha == 20
    found = layer.alpha / layer.rank * layer.up.double() @ layer.down.double()
    torch.testing.assert_close(found, matrix, rtol=1e-5, atol=1e-6)
    assert layer.error < 1e-6
    assert layer.norm == pytest.approx(float(VALUES.norm()))


def test_norm_of_a_layer_is_that_of_its_scaled_delta() -> None:
    matrix = with_values(16, 24)
    u, values, vh = torch.linalg.svd(matrix)
    factors = vh[:5], u[:, :5] * values[:5]
    layer = lora_layer("x", factors, live=factors, dtype=torch.float32, scales=(-2.0, 1.0))
    assert layer.norm == pytest.approx(2 * float(VALUES.norm()))


LYCORIS: dict[str, tuple[Any, nn.Module, dict[str, Any]]] = {
    "loha": (LohaModule, nn.Linear(12, 8), {}),
    "loha conv": (LohaModule, nn.Conv2d(12, 8, 3), {}),
    "loha tucker": (LohaModule, nn.Conv2d(12, 8, 3), {"use_tucker": True}),
    "lokr": (LokrModule, nn.Linear(12, 8), {"factor": 4}),
    "lokr both": (LokrModule, nn.Linear(48, 32), {"factor": 8, "decompose_both": True}),
    "lokr whole": (LokrModule, nn.Linear(12, 8), {"factor": 4, "full_matrix": True}),
    "lokr conv": (LokrModule, nn.Conv2d(12, 8, 3), {"factor": 4}),
    "lokr tucker": (LokrModule, nn.Conv2d(12, 8, 3), {"factor": 2, "use_tucker": True}),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_dense_delta_is_what_lycoris_adds_to_the_weight(name: str) -> None:
    kind, layer, options = LYCORIS[name]
    torch.manual_seed(0)
    module = kind("lycoris_x", layer, 1.0, 2, 3.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    parts = {key.removeprefix("lycoris_x."): each for key, each in module.state_dict().items()}
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # get_diff_weight multiplies by alpha / rank a second time for LoHa and LoKr; forward does not.
    expected = module.get_weight(weight.shape).double().view(weight.shape)
    found = dense_delta("x", parts, shape=weight.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if "lokr_w2" in parts or "tucker" in name:
        torch.testing.assert_close(dense_delta("x", parts, shape=None), found)
    else:
        with pytest.raises(AdapterError, match="--model"):
            dense_delta("x", parts, shape=None)
    with pytest.raises(AdapterError, match="do not fit"):
        dense_delta("x", parts, shape=(7, *weight.shape[1:]))


def resize(made: Made, family: str, folder: Path, keep: Keep, **options: Any) -> Rewritten:
    file = made.save(folder / "source.safetensors")
    chosen = ResizeOptions(keep=keep, **options)
    return resize_adapter(
        file, folder / "out", chosen, families=FAMILIES, base=base_of(family), overwrite=True
    )


@every_family
@pytest.mark.parametrize("factors", [lora, loha], ids=["lora", "loha"])
def test_resized_file_has_the_best_rank_of_each_layer(family: str, factors: Any, tmp_path: Path) -> None:
    made = own_file(family, factors, key=KOHYA, alpha=3.0)
    written = resize(made, family, tmp_path, Keep(rank=2), layout="lycoris")
    tensors = load_file(tmp_path / "out.safetensors")
    for layer in written.layers:
        delta = made.deltas[layer.path].double().flatten(1)
        u, values, vh = torch.linalg.svd(delta, full_matrices=False)
        found = stored_delta(tensors, adapter_file.layer_name(layer.path))
        best = u[:, :2] * values[:2] @ vh[:2]
        assert float((found - best).norm() / best.norm()) < 1e-5
        assert layer.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
    assert {layer.path for layer in written.layers} == set(made.deltas)


def test_energy_gives_each_layer_its_own_rank_in_one_alpha(tmp_path: Path) -> None:
    made = own_file("sdxl", lora, key=KOHYA, alpha=3.0)
    written = resize(made, "sdxl", tmp_path, Keep(energy=0.8), layout="kohya")
    alphas = {float(each) for key, each in load_file(written.file).items() if key.endswith(".alpha")}
    ranks = {layer.path: layer.rank for layer in written.layers}
    assert len(set(ranks.values())) > 1
    assert alphas == {float(max(ranks.values()))}
    model = make("sdxl")
    load_adapter(model, written.file)
    for path, delta in made.deltas.items():
        u, values, vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
        shares = values.square().cumsum(0) / values.square().sum()
        rank = int((shares < 0.8).sum()) + 1
        assert ranks[path] == rank
        best = u[:, :rank] * values[:rank] @ vh[:rank]
        assert effect_error(model, path, best.view(delta.shape)) < 1e-4


def test_layers_below_the_rank_keep_their_factors(tmp_path: Path) -> None:
    made = own_file("flux", lora, key=KOHYA)
    first = next(key for key in made.tensors if "lora_down" in key)
    for key in (first, first.replace("lora_down", "lora_up")):
        made.tensors[key] = torch.cat([made.tensors[key]] * 2, dim=0 if key == first else 1)
    written = resize(made, "flux", tmp_path, Keep(rank=4), layout="lycoris")
    assert {layer.rank for layer in written.layers} == {4}
    second = [key for key in made.tensors if "lora_down" in key][1]
    name = second.removesuffix(".lora_down.weight").replace("lora_unet_", "lycoris_")
    assert torch.equal(load_file(written.file)[f"{name}.lora_down.weight"], made.tensors[second])


def test_resize_that_cannot_lower_a_rank_is_refused(tmp_path: Path) -> None:
    made = own_file("flux", lora, key=KOHYA)
    with pytest.raises(AdapterError, match="rank 4 is not below 4"):
        resize(made, "flux", tmp_path, Keep(rank=4))
    with pytest.raises(AdapterError, match="--energy"):
        resize(made, "flux", tmp_path, Keep())
    with pytest.raises(AdapterError, match="energy 2"):
        resize(made, "flux", tmp_path, Keep(energy=2.0))
    assert not (tmp_path / "out.safetensors").exists()
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        resize_adapter(
            tmp_path / "source.safetensors",
            tmp_path / "out",
            ResizeOptions(keep=Keep(rank=2)),
            families=FAMILIES,
        )


def test_header_says_what_was_resized(tmp_path: Path) -> None:
    made = own_file("flux", lora, key=KOHYA)
    made.metadata = {"trigger_words": "sks", "base_model": "a/b", "seed": "7"}
    written = resize(made, "flux", tmp_path, Keep(rank=2))
    with safe_open(written.file, "pt") as content:
        header = content.metadata()
    origin = json.loads(header["resized_from"])
    assert origin["file"] == "source.safetensors"
    assert origin["rank"] == 2
    assert "energy" not in origin
    assert len(origin["sha256"]) == 64
    assert header["trigger_words"] == "sks"
    assert header["seed"] == "7"
    assert header["model_family"] == "flux"


def test_file_that_is_no_lora_is_one_message(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.ones(2, 2)}, tmp_path / "source.safetensors")
    options = ResizeOptions(keep=Keep(rank=1))
    with pytest.raises(AdapterError, match=r"encoder\.weight"):
        resize_adapter(
            tmp_path / "source.safetensors",
            tmp_path / "out",
            options,
            families=FAMILIES,
            base=base_of("flux"),
        )
