"""Fixing the ranks of a file: the factors, their errors, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter, export_live
from simpletuner.helpers.adapters.files.lora_conversion import (
    errors_by_rank,
    exact_lora,
    relative_error,
    truncated_lora,
)
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.peft_lora import METADATA_KEY
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import StoredLayer
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig, TargetPreset
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import AdapterError

SPEC = ModelSpec(
    name="toy",
    flavours={},
    default_flavour="",
    prediction_types=("epsilon",),
    pixel_alignment=8,
    minimum_alignment=8,
    default_resolution=64,
    lora_targets=(),
)
FAMILIES = {"toy": SPEC}
SCHEDULE = RankSchedule(4, min_rank=1)


def trained_layer(size: float = 0.1, **options: Any) -> TLoraLayer:
    torch.manual_seed(0)
    layer = TLoraLayer("lycoris_proj", nn.Linear(24, 16), 1.0, 4, 2.0, schedule=SCHEDULE, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * size)
    return layer


def stored(layer: TLoraLayer) -> StoredLayer:
    return StoredLayer.read("lycoris_proj", layer.custom_state_dict())


def make_adapter_file(folder: Path, *, drop: tuple[str, ...] = (), **header: str) -> Path:
    state = {
        f"lycoris_proj.{key}": tensor
        for key, tensor in trained_layer().custom_state_dict().items()
        if key not in drop
    }
    metadata = {
        adapter_file.PATHS_KEY: json.dumps({"lycoris_proj": "proj"}),
        adapter_file.SCHEDULE_KEY: json.dumps(SCHEDULE.config()),
        "model_family": "toy",
    } | header
    adapter_file.write(folder / "adapter.safetensors", state, metadata=metadata)
    return folder / "adapter.safetensors"


def dense(down: Tensor, up: Tensor, alpha: float) -> Tensor:
    return up.double().flatten(1) @ down.double().flatten(1) * alpha / down.shape[0]


@pytest.mark.parametrize("init", ["random", "weight", "vanilla"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_exact_factors_give_the_layers_own_delta(init: Any, rank: int) -> None:
    layer = trained_layer(tlora_init=init)
    plain = exact_lora("proj", stored(layer), rank=rank, dtype=torch.float32)
    a, b = (factor.detach().double() for factor in layer.lora_factors(rank))
    torch.testing.assert_close(
        dense(plain.down, plain.up, plain.alpha), b @ a * layer.scale, rtol=1e-5, atol=1e-7
    )
    assert plain.rank == (rank if init == "vanilla" else 2 * rank)
    assert plain.error == 0


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_truncation_is_the_best_approximation_of_its_rank_and_states_its_error(rank: int) -> None:
    layer = trained_layer()
    plain = truncated_lora("proj", stored(layer), rank=rank, dtype=torch.float32)
    a, b = (factor.detach().double() for factor in layer.lora_factors(rank))
    values = torch.linalg.svdvals(b @ a)
    best = float(values[rank:].norm() / values.norm())
    assert plain.rank == rank
    assert plain.error == pytest.approx(best, rel=1e-4)
    off = dense(plain.down, plain.up, plain.alpha) - b @ a * layer.scale
    assert float(off.norm() / (b @ a * layer.scale).norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [exact_lora, truncated_lora])
def test_another_scale_changes_neither_the_delta_nor_what_is_said_of_it(
    form: Any, dtype: torch.dtype
) -> None:
    layer = trained_layer()
    own, other = (form("proj", stored(layer), rank=3, dtype=dtype, scale=scale) for scale in (1.0, 1.7))
    assert (own.alpha, other.alpha) == pytest.approx((own.rank, own.rank * 1.7))
    a, b = (factor.detach().double() for factor in layer.lora_factors(3))
    whole = b @ a * layer.scale
    off = dense(other.down, other.up, other.alpha) - whole
    assert other.error == pytest.approx(float(off.norm() / whole.norm()), rel=1e-2, abs=2e-7)
    errors = errors_by_rank(stored(layer), own), errors_by_rank(stored(layer), other)
    assert errors[0] == pytest.approx(errors[1], rel=0.05, abs=1e-6)


@pytest.mark.parametrize("wrong", [0, 1], ids=["down", "up"])
def test_error_of_factors_of_which_one_is_wrong_is_that_of_their_product(wrong: int) -> None:
    live = torch.eye(2, 3), torch.eye(4, 2)
    written = tuple(factor * (1.5 if index == wrong else 1.0) for index, factor in enumerate(live))
    assert relative_error(live, written) == pytest.approx(0.5)
    assert relative_error(live, live) == 0


def test_stated_error_holds_the_rounding_of_the_dtype() -> None:
    plain = exact_lora("proj", stored(trained_layer()), rank=4, dtype=torch.bfloat16)
    a, b = (factor.detach().double() for factor in trained_layer().lora_factors(4))
    whole = b @ a * trained_layer().scale
    off = dense(plain.down, plain.up, plain.alpha) - whole
    assert plain.error == pytest.approx(float(off.norm() / whole.norm()), rel=1e-4)
    assert 1e-4 < plain.error < 1e-2


def test_bf16_keeps_a_small_delta_that_two_large_products_would_lose() -> None:
    layer = trained_layer(size=1e-3)
    plain = exact_lora("proj", stored(layer), rank=4, dtype=torch.bfloat16)
    state = {key: tensor.bfloat16().double() for key, tensor in layer.custom_state_dict().items()}
    down = torch.cat(
        [state["lambda_layer"].T * state["q_layer.weight"], state["base_lambda"].T * state["base_q"]]
    )
    up = torch.cat([state["p_layer.weight"], -state["base_p"]], dim=1)
    a, b = (factor.detach() for factor in layer.lora_factors())
    assert plain.error < 5e-3
    assert relative_error((a, b), (down, up)) > 0.3


def test_an_export_of_an_export_names_the_file_that_it_was_made_from(tmp_path: Path) -> None:
    source, options = make_adapter_file(tmp_path, trigger="sks"), ExportOptions(layout="diffusers")
    for index in range(2):
        output = tmp_path / f"export-{index}.safetensors"
        export_adapter(source, output, options, families=FAMILIES)
        header = adapter_file.read(output).metadata
        assert (header["exported_from"], header["trigger"]) == (source.name, "sks")
        assert adapter_file.SCHEDULE_KEY not in header
        source = output


def test_error_of_an_adapter_without_effect_is_zero() -> None:
    plain = truncated_lora("proj", stored(trained_layer(size=0.0)), rank=2, dtype=torch.float32)
    assert plain.error == 0
    assert not dense(plain.down, plain.up, plain.alpha).any()


def test_factors_carry_the_scale_and_the_multiplier_of_an_earlier_header(tmp_path: Path) -> None:
    source = make_adapter_file(tmp_path, lycoris_config=json.dumps({"multiplier": 0.5}))
    export_adapter(source, tmp_path / "out.safetensors", ExportOptions(layout="lycoris"), families=FAMILIES)
    down, up, alpha = (
        load_file(tmp_path / "out.safetensors")[f"lycoris_proj.{key}"]
        for key in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    assert down.shape == (8, 24)
    assert float(alpha) == 8
    a, b = (factor.detach().double() for factor in trained_layer().lora_factors())
    torch.testing.assert_close(
        dense(down, up, 8.0), b @ a * trained_layer().scale * 0.5, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("form", [exact_lora, truncated_lora])
@pytest.mark.parametrize("init", ["random", "vanilla"])
def test_error_at_every_rank_is_that_of_the_dense_deltas(init: Any, form: Any) -> None:
    layer = trained_layer(tlora_init=init)
    plain = form("proj", stored(layer), rank=3, dtype=torch.bfloat16)
    written = dense(plain.down, plain.up, plain.alpha / layer.scale)
    expected = []
    for rank in range(1, 5):
        a, b = (factor.detach().double() for factor in layer.lora_factors(rank))
        expected.append(float((b @ a - written).norm() / (b @ a).norm()))
    assert errors_by_rank(stored(layer), plain) == pytest.approx(expected, rel=1e-5)


def test_band_states_the_largest_error_within_it(tmp_path: Path) -> None:
    source = make_adapter_file(tmp_path)
    (one,) = export_adapter(source, tmp_path / "out.safetensors", ExportOptions(bands=1), families=FAMILIES)
    layer = trained_layer()
    expected = []
    for timestep in (0, 300, 700, 1000):
        a, b = (factor.detach().double() for factor in layer.lora_factors(SCHEDULE.rank_at(timestep)))
        a2, b2 = (factor.detach().double() for factor in layer.lora_factors(SCHEDULE.rank_at(500)))
        expected.append(float((b @ a - b2 @ a2).norm() / (b @ a).norm()))
    assert one.band_error == pytest.approx(max(expected), rel=1e-5)
    assert "timesteps 0 to 1000" in one.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, r"rank 5\b.*1\.\.4"),
        ({"timestep": 1001}, r"timestep 1001\b.*0\.\.1000"),
        ({"bands": 0}, r"bands 0\b.*1\.\.1000"),
        ({"rank": 2, "bands": 2}, "rank and bands"),
        ({"layout": "kohya"}, "toy.*kohya"),
    ],
)
def test_option_that_does_not_fit_is_refused_and_nothing_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = make_adapter_file(tmp_path)
    with pytest.raises(AdapterError, match=message):
        export_adapter(source, tmp_path / "out.safetensors", ExportOptions(**options), families=FAMILIES)
    assert list(tmp_path.iterdir()) == [source]


def test_file_of_others_says_how_it_can_be_exported(tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(make_adapter_file(tmp_path)), bare)
    with pytest.raises(AdapterError, match="load_adapter"):
        export_adapter(bare, tmp_path / "out.safetensors", ExportOptions(), families=FAMILIES)


@pytest.mark.parametrize(
    ("drop", "header", "message"),
    [
        (("base_q", "base_p", "base_lambda"), {}, "lycoris_proj.*export_live"),
        ((), {"model_family": "elsewhere"}, "elsewhere.*toy"),
        (("tlora_schedule", "q_layer.weight"), {}, "lycoris_proj.*q_layer|lycoris_proj.*lambda_layer"),
    ],
)
def test_file_that_lacks_something_names_it(
    drop: tuple[str, ...], header: dict[str, str], message: str, tmp_path: Path
) -> None:
    source = make_adapter_file(tmp_path, drop=drop, **header)
    with pytest.raises(AdapterError, match=message):
        export_adapter(source, tmp_path / "out.safetensors", ExportOptions(), families=FAMILIES)


def test_description_of_a_plain_lora_opens_every_rank() -> None:
    parts = {
        "lora_down.weight": torch.ones(2, 3),
        "lora_up.weight": torch.ones(4, 2),
        "alpha": torch.tensor(1.0),
    }
    plain = exact_lora(
        "x", StoredLayer("x", parts, TLoraSpec("vanilla", "last", None)), rank=2, dtype=torch.float32
    )
    assert (plain.rank, plain.alpha) == (2, 2.0)
    assert torch.equal(plain.up, torch.full((4, 2), 0.5)), "alpha 1 of rank 2"


def test_band_error_counts_the_timesteps_within_and_no_others(tmp_path: Path) -> None:
    written = export_adapter(
        make_adapter_file(tmp_path), tmp_path / "out.safetensors", ExportOptions(bands=10), families=FAMILIES
    )
    of_one_rank = [each for each in written if len({*map(SCHEDULE.rank_at, each.timesteps or ())}) == 1]
    assert 0 < len(of_one_rank) < len(written)
    for each in written:
        assert each.band_error is not None
        assert (each.band_error < 1e-6) == (each in of_one_rank)


def plain_file(folder: Path, *, beside: Path | None = None) -> Path:
    """A file of a plain LoRA of rank 4, or of one beside the layers of another file."""
    content = adapter_file.read(beside) if beside is not None else None
    tensors = dict(content.tensors) if content is not None else {}
    generator = torch.Generator().manual_seed(2)
    tensors["lycoris_mid.lora_down.weight"] = torch.randn(4, 24, generator=generator)
    tensors["lycoris_mid.lora_up.weight"] = torch.randn(16, 4, generator=generator)
    tensors["lycoris_mid.alpha"] = torch.tensor(2.0)
    header = dict(content.metadata) if content is not None else {"model_family": "toy"}
    header[adapter_file.PATHS_KEY] = json.dumps({"lycoris_mid": "mid", "lycoris_proj": "proj"})
    file = folder / "plain.safetensors"
    adapter_file.write(file, tensors, metadata=header)
    return file


def test_plain_layer_beside_t_lora_keeps_every_rank_at_every_timestep(tmp_path: Path) -> None:
    source = plain_file(tmp_path, beside=make_adapter_file(tmp_path))
    for options in (ExportOptions(timestep=1000), ExportOptions(rank=1), ExportOptions(bands=2)):
        for each in export_adapter(source, tmp_path / "out.safetensors", options, families=FAMILIES):
            tensors = load_file(each.file)
            own = load_file(source)
            assert torch.equal(tensors["unet.mid.lora_A.weight"], own["lycoris_mid.lora_down.weight"])
            assert torch.equal(tensors["unet.mid.lora_B.weight"], own["lycoris_mid.lora_up.weight"] * 0.5)
            assert tensors["unet.proj.lora_A.weight"].shape[0] < 8
            assert each.errors["mid"] == 0


def test_layers_of_a_unet_share_one_alpha_in_original_names(tmp_path: Path) -> None:
    """diffusers applies the most frequent alpha of such a file to all attention layers."""
    source = plain_file(tmp_path, beside=make_adapter_file(tmp_path))
    spec = replace(FAMILIES["toy"], original_name=lambda path: path)
    (one,) = export_adapter(
        source, tmp_path / "out.safetensors", ExportOptions(layout="kohya"), families={"toy": spec}
    )
    tensors = load_file(one.file)
    assert {key: float(tensors[key]) for key in tensors if key.endswith(".alpha")} == {
        "lora_unet_mid.alpha": 8.0,
        "lora_unet_proj.alpha": 8.0,
    }
    own = load_file(source)
    expected = dense(own["lycoris_mid.lora_down.weight"], own["lycoris_mid.lora_up.weight"], 2.0)
    down, up = (tensors[f"lora_unet_mid.{key}.weight"] for key in ("lora_down", "lora_up"))
    torch.testing.assert_close(dense(down, up, 8.0), expected, rtol=1e-6, atol=1e-7)


def test_a_file_in_diffusers_layout_is_exported_again_at_each_layers_own_scale(tmp_path: Path) -> None:
    source = plain_file(tmp_path, beside=make_adapter_file(tmp_path))
    once, twice, direct = (tmp_path / f"{name}.safetensors" for name in ("once", "twice", "direct"))
    lycoris = ExportOptions(layout="lycoris")
    for file, output, options in (
        (source, once, ExportOptions()),
        (once, twice, lycoris),
        (source, direct, lycoris),
    ):
        export_adapter(file, output, options, families=FAMILIES)
    alphas = {key: float(each) for key, each in load_file(twice).items() if key.endswith(".alpha")}
    assert alphas == {"lycoris_mid.alpha": 4.0, "lycoris_proj.alpha": 8.0}, "each layer's own rank"
    expected = load_file(direct)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(twice).items())


def test_export_of_a_peft_lora_has_the_scale_that_its_header_states(tmp_path: Path) -> None:
    export_adapter(plain_file(tmp_path), tmp_path / "a.safetensors", ExportOptions(), families=FAMILIES)
    content = adapter_file.read(tmp_path / "a.safetensors")
    stated = {"unet.lora_alpha": 8, "unet.use_rslora": True, "unet.alpha_pattern": {"m.d": 2}}
    header = {**content.metadata, METADATA_KEY: json.dumps(stated)}
    adapter_file.write(tmp_path / "b.safetensors", content.tensors, metadata=header)
    output, options = tmp_path / "out.safetensors", ExportOptions(layout="lycoris")
    export_adapter(tmp_path / "b.safetensors", output, options, families=FAMILIES)
    down, up, alpha = (
        load_file(output)[f"lycoris_mid.{key}"] for key in ("lora_down.weight", "lora_up.weight", "alpha")
    )
    a, b = (content.tensors[f"unet.mid.lora_{factor}.weight"].double() for factor in "AB")
    torch.testing.assert_close(dense(down, up, float(alpha)), b @ a * 8 / 4**0.5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_lora_that_began_by_changing_the_base_is_refused(tmp_path: Path, init: str) -> None:
    export_adapter(plain_file(tmp_path), tmp_path / "a.safetensors", ExportOptions(), families=FAMILIES)
    content = adapter_file.read(tmp_path / "a.safetensors")
    described = {**(content.entry(METADATA_KEY) or {}), "unet.init_lora_weights": init}
    header = {**content.metadata, METADATA_KEY: json.dumps(described)}
    adapter_file.write(tmp_path / "b.safetensors", content.tensors, metadata=header)
    with pytest.raises(AdapterError, match=f"lora_init_type {init}"):
        export_adapter(
            tmp_path / "b.safetensors", tmp_path / "out.safetensors", ExportOptions(), families=FAMILIES
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_rank_of_a_plain_lora_cannot_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="timestep"):
        export_adapter(
            plain_file(tmp_path),
            tmp_path / "out.safetensors",
            ExportOptions(timestep=500),
            families=FAMILIES,
        )
    (one,) = export_adapter(
        plain_file(tmp_path), tmp_path / "out.safetensors", ExportOptions(), families=FAMILIES
    )
    assert one.ranks == [4]


def test_grouped_convolution_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    config = LycorisConfig(
        algo="tlora",
        multiplier=1.0,
        linear_dim=4,
        linear_alpha=4.0,
        apply_preset=TargetPreset(target_name=(".*",)),
    )
    adapter = LycorisAdapter.create(model, config, spec=SPEC, seed=0)
    with pytest.raises(AdapterError, match="lycoris_0"):
        export_live(adapter, tmp_path / "out.safetensors", ExportOptions(), family=SPEC)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["diffusers", "lycoris"])
@pytest.mark.parametrize("init", ["random", "vanilla"])
def test_fixed_rank_of_a_scaled_schedule_is_written_at_its_gain(
    init: Any, layout: Any, tmp_path: Path
) -> None:
    layer = trained_layer(tlora_init=init)
    schedule = RankSchedule(4, variant="cosine")
    state = {f"lycoris_proj.{key}": tensor for key, tensor in layer.custom_state_dict().items()}
    header = {
        adapter_file.PATHS_KEY: json.dumps({"lycoris_proj": "proj"}),
        adapter_file.SCHEDULE_KEY: json.dumps(schedule.config()),
        "model_family": "toy",
    }
    adapter_file.write(tmp_path / "a.safetensors", state, metadata=header)
    options = ExportOptions(layout=layout, timestep=700)
    (one,) = export_adapter(
        tmp_path / "a.safetensors", tmp_path / "out.safetensors", options, families=FAMILIES
    )
    rank = schedule.rank_at(700)
    assert 1 < rank < 4
    a, b = (factor.detach().double() for factor in layer.lora_factors(rank))
    expected = b @ a * layer.scale * (4 / rank)
    content = adapter_file.read(one.file)
    down, up = (content.tensors[key] for key in sorted(content.tensors) if not key.endswith("alpha"))
    alpha = content.tensors.get("lycoris_proj.alpha")
    if alpha is None:
        alpha = (content.entry(METADATA_KEY) or {})["unet.lora_alpha"]
    torch.testing.assert_close(dense(down, up, float(alpha)), expected, rtol=1e-4, atol=1e-6)
    assert one.errors["proj"] < 1e-5


def test_schedule_in_the_tensors_of_layers_alone_fixes_the_rank_as_one_in_the_header(tmp_path: Path) -> None:
    source = make_adapter_file(tmp_path)
    stored_file = adapter_file.read(source)
    metadata = {key: each for key, each in stored_file.metadata.items() if key != adapter_file.SCHEDULE_KEY}
    bare = tmp_path / "bare.safetensors"
    adapter_file.write(bare, stored_file.tensors, metadata=metadata)
    expected, found = (
        export_adapter(file, tmp_path / "out", ExportOptions(bands=3), families=FAMILIES)
        for file in (source, bare)
    )
    assert [each.active_rank for each in found] == [SCHEDULE.rank_at(t) for t in (166, 499, 833)]
    for one, other in zip(expected, found, strict=True):
        assert (one.errors, one.band_error) == (other.errors, other.band_error)


def test_error_within_a_band_counts_the_gain_of_each_rank() -> None:
    layer = trained_layer(tlora_init="vanilla")
    plain = truncated_lora("proj", stored(layer), rank=3, dtype=torch.float32)
    gains = [4 / rank for rank in range(1, 5)]
    expected = []
    for rank, gain in enumerate(gains, start=1):
        a, b = (factor.detach().double() for factor in layer.lora_factors(rank))
        written = dense(plain.down, plain.up, plain.alpha) / layer.scale
        expected.append(float((gain * b @ a - written).norm() / (gain * b @ a).norm()))
    assert errors_by_rank(stored(layer), plain, gains=gains) == pytest.approx(expected, rel=1e-4)
