"""T-LoRA files merge to one that opens the same ranks at every timestep, or are folded or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.export import Source, has_schedule, read_source
from simpletuner.helpers.adapters.files.low_rank import Keep
from simpletuner.helpers.adapters.files.merge_terms import MergeOptions
from simpletuner.helpers.adapters.files.merging import merge_adapters
from simpletuner.helpers.adapters.files.resizing import ResizeOptions, resize_adapter
from simpletuner.helpers.adapters.files.rewriting import Rewritten
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError
from tests.unit.adapters.files.test_export import FAMILIES

STEPS = 50
WIDTHS = {"first": (24, 16), "second": (12, 20), "third": (8, 8)}


class Toy(nn.Module):
    """Three linear layers, of which a file adapts some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        for name, (columns, rows) in WIDTHS.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))


@dataclass(frozen=True)
class Written:
    """A file, and the float64 delta of its layers at each timestep by the layer's own formula."""

    file: Path
    source: Source

    def delta(self, path: str, timestep: int) -> Tensor | float:
        layer = self.source.layers.get(path)
        if layer is None:
            return 0.0
        rank = self.source.rank_at(timestep, layer)
        return dense(layer, rank) * self.source.gain_at(rank, layer)


def dense(layer: Any, rank: int) -> Tensor:
    """alpha / R [P diag(lambda m) Q - P0 diag(lambda0 m) Q0] in float64."""
    tensors = {key: tensor.double() for key, tensor in layer.tensors.items()}
    if layer.spec.init == "vanilla":
        product = tensors["lora_up.weight"][:, :rank] @ tensors["lora_down.weight"][:rank]
    else:
        product = torch.zeros((), dtype=torch.float64)
        for sign, keys in (
            (1, ("q_layer.weight", "p_layer.weight", "lambda_layer")),
            (-1, ("base_q", "base_p", "base_lambda")),
        ):
            q, p, values = (tensors[key] for key in keys)
            product = product + sign * (p[:, :rank] * values.flatten()[:rank]) @ q[:rank]
    return product * layer.scale


def tlora(
    folder: Path,
    name: str,
    *,
    init: str = "random",
    paths: Sequence[str] = ("first", "second"),
    seed: int = 0,
    alpha: float = 2.0,
    exponent: float = 1.0,
    ranks: Sequence[int] = (6, 6),
    **schedule: Any,
) -> Written:
    """A T-LoRA file whose factors are off their start."""
    torch.manual_seed(seed)
    own = RankSchedule(max(ranks), num_timesteps=STEPS, alpha=exponent, **schedule)
    toy, tensors = Toy(), {}
    for path, rank in zip(paths, ranks, strict=True):
        layer = TLoraLayer(
            f"lycoris_{path}",
            toy.get_submodule(path),
            1.0,
            rank,
            alpha,
            tlora_init=init,
            schedule=own,
            seed=seed,  # type: ignore[arg-type]  # a choice of three
        )
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        tensors |= {f"lycoris_{path}.{key}": tensor for key, tensor in layer.custom_state_dict().items()}
    header = {adapter_file.SCHEDULE_KEY: json.dumps(own.config())}
    return saved(folder / f"{name}.safetensors", tensors, paths, header)


def plain(folder: Path, name: str, *, paths: Sequence[str] = ("second", "third"), rank: int = 3) -> Written:
    """A LoRA file."""
    torch.manual_seed(5)
    tensors = {}
    for path in paths:
        columns, rows = WIDTHS[path]
        tensors |= {
            f"lycoris_{path}.lora_down.weight": torch.randn(rank, columns),
            f"lycoris_{path}.lora_up.weight": torch.randn(rows, rank) * 0.1,
            f"lycoris_{path}.alpha": torch.tensor(1.5),
        }
    return saved(folder / f"{name}.safetensors", tensors, paths, {})


def saved(file: Path, tensors: Any, paths: Sequence[str], header: dict[str, str]) -> Written:
    named = json.dumps({f"lycoris_{path}": path for path in paths})
    file.parent.mkdir(exist_ok=True)
    metadata = {adapter_file.PATHS_KEY: named, "model_family": "toy"} | header
    adapter_file.write(file, tensors, metadata=metadata)
    return read(file)


def read(file: Path) -> Written:
    return Written(file, read_source(adapter_file.read(file)))


def merge(files: Sequence[Written], folder: Path, **options: Any) -> Rewritten:
    paths = [each.file for each in files]
    return merge_adapters(paths, folder / "out", MergeOptions(**options), families=FAMILIES)


def worst_error(files: Sequence[Written], weights: Sequence[float], merged: Written) -> float:
    """Largest relative error of a layer's delta at any timestep."""
    paths = {path for each in files for path in each.source.layers}
    assert set(merged.source.layers) == paths
    errors = []
    for path in paths:
        for timestep in range(STEPS + 1):
            expected: Any = sum(
                weight * each.delta(path, timestep) for each, weight in zip(files, weights, strict=True)
            )
            errors.append(float((merged.delta(path, timestep) - expected).norm() / expected.norm()))
    return max(errors)


VARIANTS = [
    {"min_rank": 2, "exponent": 1.3},
    {"min_rank": 2, "variant": "inclusive"},
    {"min_rank": 1},
]


@pytest.mark.parametrize("schedule", VARIANTS, ids=["floor", "inclusive", "min 1"])
@pytest.mark.parametrize("init", ["random", "weight", "vanilla"])
def test_tlora_and_loras_merge_exactly_at_every_timestep(
    init: str, schedule: dict[str, Any], tmp_path: Path
) -> None:
    first = tlora(tmp_path, "a", init=init, **schedule)
    files = [first, plain(tmp_path, "b"), plain(tmp_path, "c", paths=("first", "second"), rank=2)]
    weights = (-0.7, 0.5, 2.0)
    written = merge(files, tmp_path, weights=weights)
    merged = read(written.file)
    assert worst_error(files, weights, merged) < 2e-5
    assert written.total_error < 1e-6
    own = first.source.schedule
    # The layer with both LoRAs has five ranks in front of the T-LoRA's; the others are filled up to that.
    assert merged.source.schedule.max_rank == own.max_rank + 5
    assert merged.source.schedule.min_rank == own.min_rank + 5
    assert not has_schedule(merged.source.layers["third"]), "a LoRA alone on its layer stays one"


@pytest.mark.parametrize("init", ["random", "vanilla"])
def test_merged_schedule_acts_in_a_model_as_both_files_do(init: str, tmp_path: Path) -> None:
    files = [tlora(tmp_path, "a", init=init, min_rank=2), plain(tmp_path, "b")]
    merged = merge(files, tmp_path, weights=(0.5, 1.5)).file
    live = Toy()
    adapter = load_adapter(live, merged)
    base = Toy()
    for timestep in (0, 9, 20, STEPS):
        with torch.no_grad(), adapter.rank_mask_for([timestep]):
            for path, (columns, _) in WIDTHS.items():
                x = torch.randn(1, columns)
                delta: Any = 0.5 * files[0].delta(path, timestep) + 1.5 * files[1].delta(path, timestep)
                effect = live.get_submodule(path)(x) - base.get_submodule(path)(x)
                expected = x.double() @ delta.T
                assert float((effect - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"min_rank": 2}, {"min_rank": 2}),
        ({"min_rank": 2}, {"min_rank": 4, "ranks": (8, 8)}),
        ({"min_rank": 2, "variant": "cosine"}, {"min_rank": 2, "variant": "cosine"}),
        (
            {"min_rank": 3, "variant": "linear"},
            {"min_rank": 3, "variant": "linear", "paths": ("first", "third")},
        ),
    ],
    ids=["same", "other rank", "cosine", "other layers"],
)
def test_two_files_of_init_vanilla_share_their_ranks(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    files = [
        tlora(tmp_path, "a", init="vanilla", seed=1, **first),
        tlora(tmp_path, "b", init="vanilla", seed=2, alpha=5.0, **second),
    ]
    weights = (0.8, -1.5)
    written = merge(files, tmp_path, weights=weights)
    merged = read(written.file)
    assert worst_error(files, weights, merged) < 1e-5
    assert merged.source.schedule.max_rank == max(each.source.schedule.max_rank for each in files)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"init": "random"}, {"init": "random"}),
        ({"init": "random"}, {"init": "vanilla"}),
        ({"init": "vanilla"}, {"init": "vanilla", "min_rank": 3}),
        ({"init": "vanilla"}, {"init": "vanilla", "exponent": 2.0}),
        ({"init": "vanilla"}, {"init": "vanilla", "variant": "inclusive"}),
        (
            {"init": "vanilla", "variant": "cosine"},
            {"init": "vanilla", "variant": "cosine", "min_rank": 4, "ranks": (8, 8)},
        ),
        ({"init": "vanilla", "variant": "cosine"}, None),
    ],
    ids=["two bases", "a base", "levels", "exponent", "kind", "gain", "gain of a LoRA"],
)
def test_files_that_no_schedule_opens_together_are_refused_and_folded(
    first: dict[str, Any], second: dict[str, Any] | None, tmp_path: Path
) -> None:
    one = tlora(tmp_path, "a", **{"min_rank": 2} | first)
    other = (
        plain(tmp_path, "b") if second is None else tlora(tmp_path, "b", seed=3, **{"min_rank": 2} | second)
    )
    with pytest.raises(AdapterError, match=r"--active-rank or --timestep"):
        merge([one, other], tmp_path)
    written = merge([one, other], tmp_path, timestep=20, layout="lycoris", weights=(0.5, 2.0))
    merged = read(written.file)
    assert adapter_file.SCHEDULE_KEY not in merged.source.metadata
    for path, layer in merged.source.layers.items():
        expected: Any = 0.5 * one.delta(path, 20) + 2.0 * other.delta(path, 20)
        assert float((dense(layer, layer.rank) - expected).norm() / expected.norm()) < 2e-6


def test_folding_at_an_active_rank_keeps_that_many_ranks_of_each_tlora(tmp_path: Path) -> None:
    files = [
        tlora(tmp_path, "a", init="vanilla", min_rank=2, ranks=(6, 3)),
        tlora(tmp_path, "b", seed=3, min_rank=1),
        plain(tmp_path, "c"),
    ]
    written = merge(files, tmp_path, active_rank=4, layout="lycoris")
    # Vanilla ranks once and ranks with a base twice, of the T-LoRAs; every rank of the LoRA.
    assert {layer.path: layer.rank for layer in written.layers} == {
        "first": 12,
        "second": 3 + 8 + 3,
        "third": 3,
    }
    merged = read(written.file)
    expected: Any = dense(files[0].source.layers["first"], 4) + dense(files[1].source.layers["first"], 4)
    found = dense(merged.source.layers["first"], 12)
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_folded_rank_of_a_smaller_layer_has_that_layers_gain(tmp_path: Path) -> None:
    files = [
        tlora(tmp_path, name, init="vanilla", variant="cosine", ranks=(6, 3), seed=seed)
        for seed, name in enumerate("ab")
    ]
    merged = read(merge(files, tmp_path, active_rank=4, layout="lycoris").file)
    for path, rank, gain in (("first", 4, 6 / 4), ("second", 3, 1.0)):
        expected: Any = sum(dense(each.source.layers[path], rank) * gain for each in files)
        found = dense(merged.source.layers[path], 2 * rank)
        assert float((found - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"active_rank": 7}, "1..6"),
        ({"active_rank": 0}, "1..6"),
        ({"timestep": STEPS + 1}, f"0..{STEPS}"),
        ({"layout": "diffusers"}, "format diffusers"),
        ({"rank": 3}, "rank 3"),
        ({"dtype": "bf16"}, "dtype bf16"),
    ],
    ids=["above", "zero", "timestep", "layout", "rank", "dtype"],
)
def test_options_that_lose_a_schedule_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    files = [tlora(tmp_path, "a", min_rank=2), plain(tmp_path, "b")]
    with pytest.raises(AdapterError, match=words.replace(".", r"\.")):
        merge(files, tmp_path, **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_tlora_whose_ranks_are_always_open_merges_as_a_lora(tmp_path: Path) -> None:
    files = [tlora(tmp_path, "a", min_rank=6), tlora(tmp_path, "b", seed=3, min_rank=6, init="vanilla")]
    written = merge(files, tmp_path, weights=(2.0, 1.0))
    merged = read(written.file)
    assert adapter_file.SCHEDULE_KEY not in merged.source.metadata
    assert worst_error(files, (2.0, 1.0), merged) < 2e-6


def test_tlora_is_not_resized_but_its_export_is(tmp_path: Path) -> None:
    file = tlora(tmp_path, "a", min_rank=2).file
    options = ResizeOptions(keep=Keep(rank=2))
    with pytest.raises(AdapterError, match="simpletuner export"):
        resize_adapter(file, tmp_path / "out", options, families=FAMILIES)
    always = tlora(tmp_path, "b", min_rank=6).file
    assert {
        layer.rank for layer in resize_adapter(always, tmp_path / "out", options, families=FAMILIES).layers
    } == {2}


def test_more_ranks_than_a_weight_has_are_loaded(tmp_path: Path) -> None:
    paths = ("third",)
    first = tlora(tmp_path, "a", init="vanilla", min_rank=2, paths=paths, ranks=(6,))
    files = [first, plain(tmp_path, "b", paths=paths)]
    merged = merge(files, tmp_path).file
    assert worst_error(files, (1.0, 1.0), read(merged)) < 1e-5
    adapter = load_adapter(Toy(), merged)
    assert adapter.schedule == RankSchedule(9, min_rank=5, num_timesteps=STEPS)


def test_tlora_without_base_factors_is_exported_first(tmp_path: Path) -> None:
    stored = adapter_file.read(tlora(tmp_path, "a", min_rank=2).file)
    bare = {
        key: each for key, each in stored.tensors.items() if ".base_" not in key and "schedule" not in key
    }
    adapter_file.write(tmp_path / "bare.safetensors", bare, metadata=stored.metadata)
    files = [tmp_path / "bare.safetensors", tmp_path / "a.safetensors"]
    with pytest.raises(AdapterError, match=r"base factors.*simpletuner export"):
        merge_adapters(files, tmp_path / "out", MergeOptions(), families=FAMILIES)


def test_files_with_a_schedule_in_their_layers_alone_keep_it(tmp_path: Path) -> None:
    file = tlora(tmp_path, "a", min_rank=2)
    stored = adapter_file.read(file.file)
    metadata = {key: each for key, each in stored.metadata.items() if key != adapter_file.SCHEDULE_KEY}
    adapter_file.write(tmp_path / "bare.safetensors", stored.tensors, metadata=metadata)
    other = plain(tmp_path, "b")
    written = merge([Written(tmp_path / "bare.safetensors", file.source), other], tmp_path)
    assert worst_error([file, other], (1.0, 1.0), read(written.file)) < 1e-5


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    files = [
        tlora(folder, "adapter", init="vanilla", min_rank=2, exponent=exponent)
        for folder, exponent in zip(folders, (1.0, 2.0), strict=True)
    ]
    with pytest.raises(AdapterError, match=r"a.adapter\.safetensors has .*b.adapter\.safetensors has"):
        merge(files, tmp_path)
