"""Adapter files that are damaged, hostile or someone else's: one message each, and nothing attached."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.errors import AdapterError

SCHEDULE = RankSchedule(4, min_rank=2)


class Model(nn.Module):
    """One layer to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def layer_tensors(schedule: RankSchedule | None = SCHEDULE, rank: int = 4) -> dict[str, Tensor]:
    layer = TLoraLayer("lycoris_proj", nn.Linear(12, 8), 1.0, rank, 4.0, schedule=schedule)
    return {f"lycoris_proj.{key}": tensor.detach() for key, tensor in layer.custom_state_dict().items()}


def refused(file: Path, message: str) -> None:
    model = Model().eval()
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(model, file)
    assert str(file) in str(caught.value)
    assert not [name for name, _ in model.named_modules() if CHILD_PREFIX in name]


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.reliability_row(23)
def test_header_that_claims_more_than_is_read_is_refused_before_reading(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refused(file, "its header claims 1099511627776 bytes")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"lycoris_proj.alpha":ENTRY,"lycoris_proj.alpha":ENTRY}', "'lycoris_proj.alpha' twice"),
        ('{"__metadata__":{"a":"1","a":"2"},"x":ENTRY}', "'a' twice"),
        ('{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'dtype' twice"),
        ('{"x":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}', "'x' has 9 axes"),
        ('{"x":{"dtype":"F32","shape":[' + "1," * 1_000_000 + '1],"data_offsets":[0,4]}}', "1000001 axes"),
    ],
    ids=["key", "metadata", "entry", "axes", "many axes"],
)
@pytest.mark.reliability_row(23)
def test_header_with_a_doubled_key_or_very_many_axes_is_refused(
    tmp_path: Path, header: str, message: str
) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    refused(raw_file(tmp_path / "a.safetensors", header.replace("ENTRY", entry).encode(), bytes(4)), message)


@pytest.mark.reliability_row(23)
def test_a_million_keys_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = '"lycoris_x{i}.alpha":{{"dtype":"F32","shape":[],"data_offsets":[{a},{b}]}}'
    parts = (entry.format(i=i, a=4 * i, b=4 * i + 4) for i in range(1_000_000))
    file = raw_file(tmp_path / "a.safetensors", ("{" + ",".join(parts) + "}").encode(), bytes(4_000_000))
    for module, function in ((json, "loads"), (safetensors, "safe_open")):
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("the header was read"))
    refused(file, "its header claims")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        {"x.alpha": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}},
        {
            "x.alpha": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y.alpha": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"x.alpha": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}},
        {"x.alpha": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {
            "__metadata__": {"tlora_config": 5},
            "x.alpha": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    ],
    ids=["cut", "list", "bytes", "outside", "overlap", "overflow", "dtype", "metadata"],
)
@pytest.mark.reliability_row(23)
def test_header_that_makes_no_sense_is_refused(header: object, tmp_path: Path) -> None:
    refused(raw_file(tmp_path / "a.safetensors", header, bytes(12)), "safetensors")


@pytest.mark.reliability_row(22)
def test_pickle_is_never_opened_whatever_its_name(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    for name, message in (("a.bin", r"\.bin"), ("a.safetensors", "claims|readable")):
        (tmp_path / name).write_bytes(pickle.dumps({"x.alpha": Evil()}))
        refused(tmp_path / name, message)
    assert not (tmp_path / "ran").exists()


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path, "folder")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["q_layer.weight", "base_p", "alpha", "tlora_schedule"])
@pytest.mark.reliability_row(23)
def test_value_that_is_not_finite_is_refused_naming_its_key(value: float, key: str, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in layer_tensors().items()}
    tensors[f"lycoris_proj.{key}"].view(-1)[0] = value
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", f"lycoris_proj.{key}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.reliability_row(23)
def test_factors_of_a_dtype_that_no_adapter_has_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = layer_tensors()
    tensors["lycoris_proj.base_q"] = torch.zeros(4, 12).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", rf"base_q\b.*{dtype}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16])
def test_alpha_may_be_a_whole_number_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = layer_tensors() | {"lycoris_proj.alpha": torch.tensor(4).to(dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert adapter_file.read(tmp_path / "a.safetensors").tensors["lycoris_proj.alpha"].dtype == dtype
    assert load_adapter(Model().eval(), tmp_path / "a.safetensors").num_layers == 1


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("alpha", torch.ones(3), r"alpha\b.*\b3\b"),
        ("q_layer.weight", torch.ones(4, 11), r"fit|q_layer\.weight"),
        ("base_q", torch.ones(3, 12), "fit|base_q"),
        ("lambda_layer", torch.ones(1, 5), "fit|lambda_layer"),
        ("p_layer.weight", torch.ones(9, 4), r"fit|p_layer\.weight"),
        ("tlora_schedule", torch.ones(4), "tlora_schedule.*version 1"),
        ("q_layer.weight", torch.ones(0, 12), r"\(0, 12\)"),
        ("q_layer.weight", torch.ones(()), r"\(\)"),
    ],
)
@pytest.mark.reliability_row(23)
def test_tensor_of_another_shape_is_refused(key: str, tensor: Tensor, message: str, tmp_path: Path) -> None:
    save_file(layer_tensors() | {f"lycoris_proj.{key}": tensor}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", message)


@pytest.mark.parametrize(
    "missing", ["q_layer.weight", "p_layer.weight", "lambda_layer", "base_p", "base_lambda"]
)
def test_incomplete_layer_names_what_is_missing(missing: str, tmp_path: Path) -> None:
    tensors = layer_tensors()
    del tensors[f"lycoris_proj.{missing}"]
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", missing)


def test_schedule_of_another_rank_than_the_layers_have_is_refused_naming_both(tmp_path: Path) -> None:
    save_file(layer_tensors(RankSchedule(1 << 19)), tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"max_rank 524288\b.*\b4\b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_rank": 4, "min_rank": 9}, "min_rank 9"),
        ({"max_rank": 4, "alpha": -1}, "alpha -1"),
        ({"max_rank": 4, "schedule": "steep"}, "steep"),
        ({"max_rank": "four"}, "max_rank 'four'"),
        ({"max_rank": 1 << 40}, "max_rank 1099511627776 .*1048576"),
        ({"max_rank": 10**400}, "max_rank 1000.*1048576"),
        ({"max_rank": 4, "num_timesteps": 10**12}, "num_timesteps 1000000000000 .*1048576"),
        ({"max_rank": 4.0}, r"max_rank 4\.0"),
        ({"max_rank": 4, "num_timesteps": 1e400}, "num_timesteps inf"),
        ({"max_rank": 4, "min_rank": 1}, "'min_rank': 1.*'min_rank': 2"),
        ([4], "tlora_config.*list"),
    ],
)
def test_header_schedule_outside_its_range_or_against_its_layers_is_refused(
    config: object, message: str, tmp_path: Path
) -> None:
    header = {adapter_file.SCHEDULE_KEY: json.dumps(config)}
    save_file(layer_tensors(), tmp_path / "a.safetensors", metadata=header)
    refused(tmp_path / "a.safetensors", message)


@pytest.mark.parametrize("key", [adapter_file.LYCORIS_KEY, adapter_file.HASH_KEY, adapter_file.PATHS_KEY])
def test_header_entry_that_cannot_be_read_leaves_nothing_attached(key: str, tmp_path: Path) -> None:
    save_file(layer_tensors(), tmp_path / "a.safetensors", metadata={key: "[1]"})
    refused(tmp_path / "a.safetensors", f"{key}.*list")


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"strong"', "null"])
def test_multiplier_that_is_no_finite_number_is_refused(value: str, tmp_path: Path) -> None:
    header = {adapter_file.LYCORIS_KEY: f'{{"multiplier": {value}}}'}
    save_file(layer_tensors(), tmp_path / "a.safetensors", metadata=header)
    refused(tmp_path / "a.safetensors", "multiplier")


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("lycoris_proj.base_q", torch.full((4, 12), 1e300, dtype=torch.float64), r"lycoris_proj\.base_q"),
        ("lycoris_proj.dora_scale", torch.ones(8, 1), "dora_scale"),
        ("lycoris_proj.alpha", torch.tensor(True), r"alpha.*torch\.bool"),
        ("lycoris_\x1b[31m.alpha", torch.tensor(1.0), r"x1b\[31m"),
        ("../lycoris.alpha", torch.tensor(1.0), r"\.\./lycoris"),
        ("lycoris_lone.alpha", torch.tensor(1.0), "fit|lycoris_lone"),
        (
            "lycoris_proj.tlora_schedule",
            torch.tensor([1.0, 1, 4, 2, 1, 1000, -1, 0, 0]),
            r"tlora_schedule.*-1\.0",
        ),
        (
            "lycoris_proj.tlora_schedule",
            torch.tensor([1.0, 1, 4, 2, 1, 1000, 0, 0.9, 0]),
            r"tlora_schedule.*0\.8999",
        ),
    ],
)
@pytest.mark.reliability_row(23)
def test_tensor_that_no_adapter_has_is_refused(
    key: str, tensor: Tensor, message: str, tmp_path: Path
) -> None:
    save_file(layer_tensors() | {key: tensor}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", message)


def test_header_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    header = {adapter_file.SCHEDULE_KEY: "[" * 100_000}
    save_file(layer_tensors(), tmp_path / "a.safetensors", metadata=header)
    refused(tmp_path / "a.safetensors", "tlora_config.*JSON")


def test_file_of_another_family_names_both_and_what_to_do(tmp_path: Path) -> None:
    tensors = {key.replace("proj", "other_block"): tensor for key, tensor in layer_tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"model_family": "elsewhere"})
    refused(
        tmp_path / "a.safetensors",
        "1 of .*1 layers.*Model.*elsewhere",
    )


@pytest.mark.parametrize("dtype", adapter_file.DTYPES)
def test_every_floating_dtype_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in layer_tensors().items() if "schedule" not in key}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(Model().eval(), tmp_path / "a.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
