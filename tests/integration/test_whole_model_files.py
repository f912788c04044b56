"""A whole model as a single file: other programs' names, the same tensors."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from simpletuner.cli import app
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.original_layout import export_model, original_tensors
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.models.single_file import DENOISER_PREFIX, SingleFile, load_single_file
from simpletuner.helpers.models.whole_model import WholeModel
from tests.integration.family_runs import MODELS


def sdxl() -> nn.Module:
    """A UNet with SDXL's blocks and layers per block, in fewer channels."""
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


def tiny(name: str) -> nn.Module:
    spec = specs()[MODELS[name].family]
    model: Any = AutoModel.from_pretrained(str(MODELS[name].folder()), subfolder=spec.denoiser_name)
    return model  # type: ignore[no-any-return]


DENOISERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "sdxl": ("sdxl", sdxl),
    "flux": ("flux", functools.partial(tiny, "flux")),
    "flux2-dev": ("flux2", functools.partial(tiny, "flux2-dev")),
    "flux2-klein": ("flux2", functools.partial(tiny, "flux2-klein")),
}


@functools.cache
def saved(name: str) -> tuple[Path, Any]:
    """The folder that training writes, in bf16 with every tensor different, and its model."""
    family, build = DENOISERS[name]
    torch.manual_seed(0)
    model = build().to(torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    folder = Path(tempfile.mkdtemp(prefix="whole_model_")) / specs()[family].denoiser_name
    WholeModel(model, folder=folder.name).save(folder, metadata={"steps": "3"})
    return folder, model


@pytest.mark.parametrize("name", [name for name in DENOISERS if name != "flux"])
def test_stock_diffusers_and_our_reader_load_the_single_file(name: str, tmp_path: Path) -> None:
    folder, model = saved(name)
    file = tmp_path / "model.safetensors"
    export_model(folder, file, dtype=None, overwrite=False)
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    stock = type(model).from_single_file(
        str(file), config=str(folder), torch_dtype=torch.bfloat16, local_files_only=True
    )
    ours = load_single_file(
        type(model), SingleFile(file, DENOISER_PREFIX), folder=folder, dtype=torch.bfloat16
    )
    expected = model.state_dict()
    for found in (stock.state_dict(), ours.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_stock_diffusers_converts_flux_at_its_real_width() -> None:
    """Its converter knows the real width only, so every tensor has its rows here and one column."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    torch.manual_seed(0)
    expected = {
        name: torch.randn(len(weight), *([1] * (weight.ndim - 1))).bfloat16()
        for name, weight in model.named_parameters()
    }
    found = convert_flux_transformer_checkpoint_to_diffusers(original_tensors(expected, specs()["flux"]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", DENOISERS)
def test_folder_is_loaded_by_diffusers(name: str) -> None:
    folder, model = saved(name)
    found: Any = AutoModel.from_pretrained(str(folder), torch_dtype=torch.bfloat16)
    assert type(found) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
    assert not any("path" in key for key in found.load_config(str(folder)))


def test_names_are_those_of_the_original_checkpoints(tmp_path: Path) -> None:
    found = {}
    for name in ("sdxl", "flux"):
        export_model(saved(name)[0], tmp_path / name, dtype=torch.float16, overwrite=False)
        found[name] = load_file(tmp_path / name)
    unet, flux = found["sdxl"], found["flux"]
    assert all(key.startswith(DENOISER_PREFIX) for key in unet)
    assert {f"{DENOISER_PREFIX}{key}" for key in ("out.0.weight", "input_blocks.1.0.in_layers.0.bias")} <= {
        *unet
    }
    assert {"double_blocks.0.img_attn.norm.query_norm.scale", "final_layer.linear.weight"} <= {*flux}
    assert {tensor.dtype for tensor in unet.values()} == {torch.float16}


def test_large_models_are_split_as_diffusers_splits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = saved("flux")
    monkeypatch.setattr("simpletuner.helpers.models.whole_model.LARGEST_FILE", "100KB")
    folder = tmp_path / "transformer"
    WholeModel(model, folder="transformer").save(folder, metadata={})
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    found: Any = AutoModel.from_pretrained(str(folder), torch_dtype=torch.bfloat16)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
    export_model(folder, tmp_path / "one.safetensors", dtype=None, overwrite=False)
    export_model(saved("flux")[0], tmp_path / "other.safetensors", dtype=None, overwrite=False)
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "other"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_command_exports_a_folder_and_refuses_options_of_adapters(tmp_path: Path) -> None:
    folder, _ = saved("flux")
    file = tmp_path / "model.safetensors"
    arguments = ["export", str(folder), "--output", str(file)]
    refused = CliRunner().invoke(app, [*arguments, "--rank", "4"])
    assert refused.exit_code != 0
    assert "--rank" in f"{refused.output}{refused.exception}"
    assert not file.exists()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "img_in.weight" in load_file(file)


def test_incomplete_and_unknown_tensors_are_refused() -> None:
    spec = specs()["flux"]
    with pytest.raises(ModelError, match=r"double_blocks\.0\.img_attn\.qkv"):
        original_tensors({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}, spec)
    with pytest.raises(ModelError, match=r"transformer_blocks\.0\.attn\.to_x"):
        original_tensors({"transformer_blocks.0.attn.to_x.weight": torch.ones(2, 2)}, spec)
