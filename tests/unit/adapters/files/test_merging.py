"""Merged files against dense sums in float64: LoRAs of every layout, LoHa and LoKr, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.adapters.files import adapter_file, labels
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions
from simpletuner.helpers.adapters.files.merging import checked_weights, merge_adapters, parsed_weights
from simpletuner.helpers.adapters.files.rewriting import BaseModel, Rewritten
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.models import registry
from tests.unit.adapters.files.foreign.makers import (
    LAYERS,
    Made,
    effect_error,
    full,
    loha,
    lokr,
    lora,
    make,
    original_file,
    own_file,
)
from tests.unit.adapters.files.foreign.test_standard_lora import OWN_NAMES, peft, underscored

FAMILIES = registry.specs()
KOHYA = underscored("lora_unet_")
every_family = pytest.mark.parametrize("family", LAYERS)


def base_of(family: str) -> BaseModel:
    return BaseModel(family=family, denoiser=make(family).to("meta"))


def merge(files: Sequence[Path], output: Path, *, base: BaseModel | None = None, **options: Any) -> Rewritten:
    return merge_adapters(files, output, MergeOptions(**options), families=FAMILIES, base=base)


def without(made: Made, path: str, *, key: Callable[[str, str], str]) -> Made:
    """The file without the layer of a path."""
    name = key(path, "")
    tensors = {each: tensor for each, tensor in made.tensors.items() if not each.startswith(name)}
    assert len(tensors) < len(made.tensors)
    deltas = {each: delta for each, delta in made.deltas.items() if each != path}
    return Made(tensors, deltas, made.metadata)


def weighted_sum(files: Sequence[Made], weights: Sequence[float]) -> dict[str, Tensor]:
    deltas: dict[str, Tensor] = {}
    for made, weight in zip(files, weights, strict=True):
        for path, delta in made.deltas.items():
            deltas[path] = deltas.get(path, torch.zeros((), dtype=torch.float64)) + delta.double() * weight
    return deltas


def worst(family: str, file: Path, deltas: Mapping[str, Tensor]) -> float:
    model = make(family)
    adapter = load_adapter(model, file)
    assert adapter.num_layers == len(deltas)
    return max(effect_error(model, path, delta) for path, delta in deltas.items())


def stored_delta(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Delta of a layer in kohya's or LyCORIS's layout, float64."""
    down, up = (tensors[f"{name}.lora_{which}.weight"].double().flatten(1) for which in ("down", "up"))
    return float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down


@every_family
@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "lycoris"])
def test_loras_of_two_layouts_merge_to_the_weighted_sum_of_their_deltas(
    family: str, layout: Any, tmp_path: Path
) -> None:
    first = original_file(family, lora, key=KOHYA, alpha=3.0)
    second = own_file(family, lora, key=peft("transformer."))
    dropped = next(iter(second.deltas))
    second = without(second, dropped, key=lambda name, _: f"transformer.{name}.lora_")
    files = [made.save(tmp_path / f"{name}.safetensors") for name, made in (("a", first), ("b", second))]
    weights, output = (0.7, -0.3), tmp_path / "out.safetensors"
    written = merge(files, output, base=base_of(family), weights=weights, layout=layout)
    deltas = weighted_sum((first, second), weights)
    assert worst(family, output, deltas) < 1e-5
    assert {layer.path for layer in written.layers} == set(deltas)
    assert {layer.path: layer.rank for layer in written.layers}[dropped] == 4
    assert {layer.rank for layer in written.layers} == {4, 8}
    assert written.total_error < 1e-7, "rounding to float32"
    # What a merge writes names its layers, so it merges again without the base model.
    if layout != "comfyui":
        again = tmp_path / "again.safetensors"
        merge([output, output], again, layout="lycoris")
        assert worst(family, again, {path: 2 * delta for path, delta in deltas.items()}) < 1e-5


def test_layers_of_every_rank_get_one_alpha_where_the_layout_needs_it(tmp_path: Path) -> None:
    first, second = (original_file("sdxl", lora, key=KOHYA, alpha=alpha) for alpha in (1.0, 8.0))
    kept = "middle_block.1.proj_in"
    second = without(second, "mid_block.attentions.0.proj_in", key=lambda *_: KOHYA(kept, ""))
    files = [made.save(tmp_path / f"{name}.safetensors") for name, made in (("a", first), ("b", second))]
    merge(files, tmp_path / "out.safetensors", base=base_of("sdxl"), layout="kohya")
    tensors = load_file(tmp_path / "out.safetensors")
    name = KOHYA(kept, "").removesuffix(".")
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {8.0}
    assert tensors[f"{name}.lora_down.weight"].shape[0] == 4
    expected = first.deltas["mid_block.attentions.0.proj_in"]
    torch.testing.assert_close(stored_delta(tensors, name).float(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reported_error_is_that_of_the_dense_sum(dtype: str, tmp_path: Path) -> None:
    made = [original_file("flux", lora, key=KOHYA, alpha=2.0), own_file("flux", lora, key=KOHYA)]
    files = [each.save(tmp_path / f"{index}.safetensors") for index, each in enumerate(made)]
    output = tmp_path / "out.safetensors"
    written = merge(files, output, base=base_of("flux"), rank=3, dtype=dtype, layout="lycoris")
    tensors, deltas = load_file(output), weighted_sum(made, (1.0, 1.0))
    missing = whole = 0.0
    for layer in written.layers:
        delta = deltas[layer.path]
        found = stored_delta(tensors, adapter_file.layer_name(layer.path))
        error = (delta - found).norm() / delta.norm()
        assert layer.error == pytest.approx(float(error), rel=1e-4)
        if dtype == "fp32":
            best = torch.linalg.svdvals(delta)[3:].norm() / delta.norm()
            assert layer.error == pytest.approx(float(best), rel=1e-4)
        missing, whole = missing + float((delta - found).norm()) ** 2, whole + float(delta.norm()) ** 2
        assert layer.rank == 3
    assert written.total_error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)
    assert any("error" in line for line in written.text(per_layer=True).splitlines())
    assert len(written.text(per_layer=True).splitlines()) == 1 + len(written.layers)


@every_family
@pytest.mark.parametrize("factors", [loha, lokr], ids=["loha", "lokr"])
def test_loha_and_lokr_merge_with_a_lora_to_the_best_rank_of_the_dense_sum(
    family: str, factors: Any, tmp_path: Path
) -> None:
    made = [own_file(family, factors, key=KOHYA, alpha=3.0), own_file(family, lora, key=KOHYA)]
    files = [each.save(tmp_path / f"{index}.safetensors") for index, each in enumerate(made)]
    output, weights = tmp_path / "out.safetensors", (0.5, -2.0)
    with pytest.raises(AdapterError, match="--rank"):
        merge(files, output, base=base_of(family), weights=weights)
    written = merge(files, output, base=base_of(family), weights=weights, rank=6)
    deltas = weighted_sum(made, weights)
    for layer in written.layers:
        delta = deltas[layer.path].flatten(1)
        best = float(torch.linalg.svdvals(delta)[6:].norm() / delta.norm())
        assert layer.error == pytest.approx(best, rel=1e-4, abs=1e-7)
    full_rank = merge(files, tmp_path / "full.safetensors", base=base_of(family), weights=weights, rank=999)
    assert full_rank.total_error < 1e-6
    assert worst(family, tmp_path / "full.safetensors", deltas) < 1e-5


def test_loha_without_base_model_is_not_taken_for_a_linear_layer(tmp_path: Path) -> None:
    made = own_file("sdxl", loha, key=underscored("lycoris_"))
    paths = {adapter_file.layer_name(path): path for path in made.deltas}
    made.metadata = {"model_family": "sdxl", adapter_file.PATHS_KEY: json.dumps(paths)}
    file = made.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="--model"):
        merge([file, file], tmp_path / "out.safetensors", rank=4)
    written = merge([file, file], tmp_path / "out.safetensors", rank=4, base=base_of("sdxl"))
    assert len(written.layers) == len(made.deltas)


def dora(family: str, name: str, folder: Path) -> Path:
    made = own_file(family, lora, key=OWN_NAMES["kohya" if name == "dora_scale" else "diffusers unet"])
    key = next(key for key in made.tensors if "lora_up" in key or "lora_B" in key)
    for part in ("lora_up.weight", "lora_B.weight"):
        made.tensors[key.replace(part, name)] = torch.ones(made.tensors[key].shape[0], 1)
    return made.save(folder / "dora.safetensors")


@pytest.mark.parametrize("name", ["dora_scale", "lora_magnitude_vector"])
def test_dora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    file = dora("sdxl", name, tmp_path)
    with pytest.raises(AdapterError, match=f"{name}.*DoRA"):
        merge([file, file], tmp_path / "out.safetensors", base=base_of("sdxl"))


@pytest.mark.parametrize(
    ("weights", "num_files", "words"),
    [
        ((1.0,), 1, "at least 2"),
        ((1.0, 2.0, 3.0), 2, "3 values for 2 files"),
        ((1.0, 0.0), 2, "0 is no weight"),
        ((1.0, float("nan")), 2, "nan is no weight"),
        ((float("inf"), 1.0), 2, "inf is no weight"),
    ],
    ids=["one file", "count", "zero", "nan", "inf"],
)
def test_weights_that_make_no_sum_are_refused(weights: Sequence[float], num_files: int, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        checked_weights(weights, num_files=num_files)


def test_weights_are_read_from_text_and_default_to_one() -> None:
    assert parsed_weights("0.7,-0.3") == [0.7, -0.3]
    assert checked_weights((), num_files=3) == [1.0, 1.0, 1.0]
    with pytest.raises(AdapterError, match="'0\\.7;0\\.3'"):
        parsed_weights("0.7;0.3")


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    made = own_file("flux", lora, key=KOHYA)
    return [made.save(tmp_path / f"{name}.safetensors") for name in "ab"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"active_rank": 4}, "no file has a rank schedule"),
        ({"timestep": 500}, "no file has a rank schedule"),
        ({"active_rank": 4, "timestep": 500}, "exclude each other"),
    ],
    ids=["rank 0", "no schedule", "no timestep", "both"],
)
def test_options_that_do_not_apply_are_refused(
    options: dict[str, Any], words: str, two_files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=words):
        merge(two_files, tmp_path / "out.safetensors", base=base_of("flux"), **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_files_of_two_families_and_of_none_are_refused(two_files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(AdapterError, match="--model"):
        merge(two_files, output)
    with pytest.raises(AdapterError, match="not in this UNet2DConditionModel"):
        merge(two_files, output, base=base_of("sdxl"))
    merge(two_files, tmp_path / "flux.safetensors", base=base_of("flux"))
    other = own_file("flux2", lora, key=KOHYA).save(tmp_path / "c.safetensors")
    merge([other, other], tmp_path / "flux2.safetensors", base=base_of("flux2"))
    with pytest.raises(
        AdapterError, match=r"flux\.safetensors is for flux, .*flux2\.safetensors is for flux2"
    ):
        merge([tmp_path / "flux.safetensors", tmp_path / "flux2.safetensors"], output)
    with pytest.raises(AdapterError, match=r"flux\.safetensors is for the family flux, .* for flux2"):
        merge([tmp_path / "flux.safetensors", other], output, base=base_of("flux2"))
    no_lora = tmp_path / "full.safetensors"
    own_file("flux", full, key=KOHYA).save(no_lora)
    with pytest.raises(AdapterError, match="diff"):
        merge([two_files[0], no_lora], output, base=base_of("flux"))


def test_layer_of_another_width_is_refused_with_and_without_the_model(tmp_path: Path) -> None:
    made = own_file("flux", lora, key=KOHYA)
    key = next(key for key in made.tensors if "lora_down" in key)
    made.tensors[key] = torch.cat([made.tensors[key]] * 2, dim=1)
    wide = made.save(tmp_path / "wide.safetensors")
    with pytest.raises(AdapterError, match="is for a weight of"):
        merge([wide, wide], tmp_path / "out.safetensors", base=base_of("flux"))
    named = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file, columns in zip(named, (8, 16), strict=True):
        layer = {"lora_down.weight": torch.ones(2, columns), "lora_up.weight": torch.ones(4, 2)}
        tensors = {f"lycoris_x_embedder.{part}": tensor for part, tensor in layer.items()}
        header = {adapter_file.PATHS_KEY: json.dumps({"lycoris_x_embedder": "x_embedder"})}
        adapter_file.write(file, tensors, metadata=header | {"model_family": "flux"})
    with pytest.raises(AdapterError, match=r"4x8 in .*a\.safetensors, of 4x16 in"):
        merge(named, tmp_path / "out.safetensors")


def test_existing_file_is_kept_without_overwrite(two_files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        merge(two_files, output, base=base_of("flux"))
    assert output.read_text() == "mine"
    merge_adapters(two_files, output, MergeOptions(), families=FAMILIES, base=base_of("flux"), overwrite=True)
    assert output.stat().st_size > 4


def labelled(file: Path, *, header: Mapping[str, str], scale: float = 1.0) -> Path:
    """A LoRA of one layer of Flux.1 that names its layer."""
    tensors = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(4, 2) * scale}
    tensors = {f"lycoris_x_embedder.{part}": tensor for part, tensor in tensors.items()}
    paths = {adapter_file.PATHS_KEY: json.dumps({"lycoris_x_embedder": "x_embedder"})}
    adapter_file.write(file, tensors, metadata=paths | {"model_family": "flux"} | dict(header))
    return file


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return dict(content.metadata())


def test_header_says_what_was_merged_and_keeps_what_is_true_of_all(tmp_path: Path) -> None:
    shared = {
        labels.SPECIFICATION: "1.0.0",
        labels.ARCHITECTURE: "flux-1-dev/lora",
        "base_model": "black-forest-labs/FLUX.1-dev",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "2",
        "learning_rate": "1e-4",
    }
    own = [
        {labels.TITLE: "cat", labels.TRIGGERS: "sks cat", "trigger_words": "sks cat", "seed": "1"},
        {labels.TITLE: "ink", labels.TRIGGERS: "ink, sks cat", "trigger_words": "ink", "seed": "2"},
    ]
    files = [
        labelled(tmp_path / f"{name}.safetensors", header=shared | header | {"saved_multiplier": "0.5"})
        for name, header in zip(("cat", "ink"), own, strict=True)
    ]
    output = tmp_path / "out.safetensors"
    merge(files, output, weights=(0.5, 2.0))
    header = header_of(output)
    assert json.loads(header["merged_from"]) == [
        {"file": file.name, "weight": weight, "sha256": _sha(file)}
        for file, weight in zip(files, (0.5, 2.0), strict=True)
    ]
    assert header["trigger_words"] == "sks cat, ink"
    assert header[labels.TRIGGERS] == "sks cat, ink"
    assert header[labels.USAGE] == labels.usage_hint("sks cat, ink")
    assert header[labels.TITLE] == "cat + ink"
    assert header["base_model"] == shared["base_model"]
    assert header["learning_rate"] == "1e-4"
    assert header["ss_network_dim"] == "4"
    assert header["ss_network_module"] == labels.LORA_MODULE
    assert header[adapter_file.VERSION_KEY] == adapter_file.VERSION
    assert "seed" not in header
    assert "saved_multiplier" not in header
    assert header[labels.HASH] != _sha(files[0])


def _sha(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("headers", "is_warned"),
    [
        ([{"base_weights_hash": '{"lycoris_x_embedder": "1"}'}] * 2, False),
        ([{"base_weights_hash": f'{{"lycoris_x_embedder": "{number}"}}'} for number in (1, 2)], True),
        ([{"base_model": "a/b"}, {"base_model": "a/c"}], True),
        ([{"base_model": "a/b"}, {}], False),
    ],
    ids=["same weights", "other weights", "other model", "not stated"],
)
def test_files_of_other_base_weights_are_warned_about(
    headers: list[dict[str, str]], is_warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [
        labelled(tmp_path / f"{index}.safetensors", header=header) for index, header in enumerate(headers)
    ]
    with caplog.at_level(logging.WARNING):
        merge(files, tmp_path / "out.safetensors")
    assert bool(caplog.records) is is_warned
    kept = "base_weights_hash" in header_of(tmp_path / "out.safetensors")
    assert kept is ("base_weights_hash" in headers[0] and not is_warned)


@pytest.mark.parametrize(
    ("part", "tensor", "words"),
    [
        ("lora_up.weight", torch.ones(4, 3), "ranks 2 and 3"),
        ("lora_up.weight", None, "lora_up"),
    ],
    ids=["other rank", "missing"],
)
@pytest.mark.parametrize("layout", ["lycoris", "diffusers"])
def test_damaged_file_is_one_message(
    part: str, tensor: Tensor | None, words: str, layout: Any, tmp_path: Path
) -> None:
    whole = labelled(tmp_path / "whole.safetensors", header={})
    merge([whole, whole], tmp_path / "out.safetensors", layout=layout, rank=2)
    stored = adapter_file.read(tmp_path / "out.safetensors")
    key = next(key for key in stored.tensors if part in key or "lora_B" in key)
    tensors = {name: each for name, each in stored.tensors.items() if name != key}
    if tensor is not None:
        tensors[key] = tensor
    adapter_file.write(tmp_path / "damaged.safetensors", tensors, metadata=stored.metadata)
    with pytest.raises(AdapterError, match=words.replace("lora_up", "it has alpha, lora_down|lora_B")):
        merge([whole, tmp_path / "damaged.safetensors"], tmp_path / "x.safetensors")


def test_families_of_files_with_one_name_are_compared(tmp_path: Path) -> None:
    files = []
    for folder, family in (("a", "flux"), ("b", "flux2")):
        (tmp_path / folder).mkdir()
        files.append(labelled(tmp_path / folder / "x.safetensors", header={"model_family": family}))
    with pytest.raises(AdapterError, match="families differ"):
        merge(files, tmp_path / "out.safetensors")
