"""A LoRA from two models: against dense differences, in every layout of the models' files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.helpers.adapters.files import adapter_file, labels
from simpletuner.helpers.adapters.files.extraction import ExtractOptions
from simpletuner.helpers.adapters.files.rewriting import Rewritten
from simpletuner.helpers.adapters.network import load_adapter
from simpletuner.helpers.errors import AdapterError, ModelError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.denoiser_weights import find_denoiser, weight_reader, with_weights
from simpletuner.helpers.models.single_file import DENOISER_PREFIX
from simpletuner.helpers.sampling.extract_command import extract
from tests.integration.test_export import make_unet
from tests.unit.adapters.files.foreign.makers import LAYERS, effect_error, make

SPECS = registry.specs()
every_family = pytest.mark.parametrize("family", LAYERS)
# Layers of the family's targets, among them some that the original checkpoint joins to others.
CHANGED: Mapping[str, Sequence[str]] = {
    "sdxl": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ),
    "flux": ("transformer_blocks.1.attn.to_k", "single_transformer_blocks.1.proj_mlp"),
    "flux2": ("transformer_blocks.0.attn.add_v_proj", "single_transformer_blocks.1.attn.to_qkv_mlp_proj"),
}
OUTSIDE = {"sdxl": "conv_in", "flux": "x_embedder", "flux2": "x_embedder"}
NORM = {
    "sdxl": "mid_block.attentions.0.norm",
    "flux": "transformer_blocks.1.attn.norm_q",
    "flux2": "transformer_blocks.1.attn.norm_q",
}
RANK = 3


def model(family: str) -> Any:
    return make_unet() if family == "sdxl" else make(family)


def tune(base: nn.Module, family: str) -> Any:
    """The model with a change of rank 3 in two targets, and changes of a layer and a norm outside them."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for path in CHANGED[family]:
            weight = tuned.get_parameter(f"{path}.weight")
            left, right = (torch.randn(size, RANK, generator=generator) for size in weight.shape)
            weight.add_(0.1 * left @ right.T)
        tuned.get_parameter(f"{OUTSIDE[family]}.weight").mul_(1.25)
        tuned.get_parameter(f"{NORM[family]}.weight").add_(0.5)
    return tuned


def in_folder(denoiser: Any, family: str, folder: Path) -> Path:
    denoiser.save_pretrained(folder / SPECS[family].denoiser_name, max_shard_size="100KB")
    return folder


def original_tensors(denoiser: nn.Module, family: str) -> dict[str, Tensor]:
    """Weights of linear layers and convolutions under the original checkpoint's names, joined as there."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for path, layer in denoiser.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rows: Any = SPECS[family].original_name(path)  # type: ignore[misc]  # every family here has it
        if isinstance(rows, str):
            tensors[f"{rows}.weight"] = layer.weight.detach()
            continue
        own = layer.weight.detach().chunk(len(rows.pieces))
        pieces.setdefault(rows.name, {}).update(dict(zip(rows.pieces, own, strict=True)))
    joined = {f"{name}.weight": torch.cat([own[key] for key in sorted(own)]) for name, own in pieces.items()}
    return tensors | joined


def in_file(denoiser: nn.Module, family: str, file: Path, *, prefix: str = "", own: bool = False) -> Path:
    tensors = dict(denoiser.state_dict()) if own else original_tensors(denoiser, family)
    save_file({f"{prefix}{key}": tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    return file


Models = tuple[Any, Any, Path, Path]


@pytest.fixture
def models(tmp_path: Path) -> Callable[[str], Models]:
    def of(family: str) -> Models:
        base = model(family)
        tuned = tune(base, family)
        folders = [
            in_folder(each, family, tmp_path / name) for name, each in (("base", base), ("tuned", tuned))
        ]
        return base, tuned, *folders  # type: ignore[return-value]  # two folders

    return of


def run(base: Path, tuned: Path, output: Path, *, model: Path | None = None, **options: Any) -> Rewritten:
    chosen = ExtractOptions(**{"rank": RANK} | options)
    return extract(str(base), str(tuned), output, options=chosen, model=None if model is None else str(model))


def difference(base: nn.Module, tuned: nn.Module, path: str) -> Tensor:
    first, second = (each.get_parameter(f"{path}.weight").detach().double() for each in (base, tuned))
    return second - first


@every_family
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_extracted_lora_makes_one_model_of_the_other(
    family: str, layout: Any, models: Callable[[str], Models], tmp_path: Path
) -> None:
    base, tuned, *folders = models(family)
    output = tmp_path / "out.safetensors"
    written = run(*folders, output, layout=layout)
    assert {layer.path for layer in written.layers} == set(CHANGED[family])
    assert written.total_error < 1e-6
    live = copy.deepcopy(base)
    load_adapter(live, output)
    for path in CHANGED[family]:
        assert effect_error(live, path, difference(base, tuned, path)) < 1e-4
    left_out = {line.split()[-1]: float(line.split()[0]) for line in written.left_out}
    assert left_out.keys() == {f"{OUTSIDE[family]}.weight", f"{NORM[family]}.weight"}
    assert left_out[f"{OUTSIDE[family]}.weight"] == pytest.approx(0.25, rel=0.05)
    assert written.text(per_layer=True).count("left out") == 2


@every_family
def test_lower_rank_has_the_error_of_the_singular_values_that_it_drops(
    family: str, models: Callable[[str], Models], tmp_path: Path
) -> None:
    base, tuned, *folders = models(family)
    written = run(*folders, tmp_path / "out.safetensors", rank=2)
    for layer in written.layers:
        delta = difference(base, tuned, layer.path)
        values = torch.linalg.svdvals(delta)
        assert layer.error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-4)
        assert layer.norm == pytest.approx(float(delta.norm()), rel=1e-6)


@every_family
@pytest.mark.parametrize("kind", ["original", "with prefix", "diffusers"])
def test_single_files_give_what_the_folders_give(
    family: str, kind: str, models: Callable[[str], Models], tmp_path: Path
) -> None:
    base, tuned, *folders = models(family)
    prefix = DENOISER_PREFIX if kind == "with prefix" else ""
    files = [
        in_file(each, family, tmp_path / f"{name}.safetensors", prefix=prefix, own=kind == "diffusers")
        for name, each in (("base", base), ("tuned", tuned))
    ]
    run(*folders, tmp_path / "folders.safetensors")
    expected = load_file(tmp_path / "folders.safetensors")
    mixed = run(folders[0], files[1], tmp_path / "mixed.safetensors")
    with pytest.raises(ModelError, match="--model"):
        run(*files, tmp_path / "x.safetensors")
    run(*files, tmp_path / "files.safetensors", model=folders[0])
    for name in ("mixed", "files"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    is_named = kind == "diffusers"
    assert any(line.startswith("Not compared") for line in mixed.notes) is not is_named


def test_every_weight_of_a_folder_is_read_by_its_name(models: Callable[[str], Models]) -> None:
    base, _, folder, _ = models("flux")
    found = find_denoiser(str(folder), option="--base")
    with weight_reader(
        with_weights(found, str(folder), option="--base"), found.on_meta(), spec=found.spec
    ) as read:
        for name, parameter in base.named_parameters():
            weight = read(name)
            assert weight is not None
            assert torch.equal(weight, parameter)
        assert read("nothing.weight") is None


def test_convolutions_are_extracted_where_their_blocks_are_targets(
    models: Callable[[str], Models], tmp_path: Path
) -> None:
    base, _, folder, _ = models("sdxl")
    tuned, path = copy.deepcopy(base), "down_blocks.1.resnets.0.conv1"
    with torch.no_grad():
        tuned.get_parameter(f"{path}.weight").add_(torch.randn(32, 16, 3, 3) * 0.1)
    changed = in_folder(tuned, "sdxl", tmp_path / "conv")
    with pytest.raises(AdapterError, match="--target"):
        run(folder, changed, tmp_path / "x.safetensors")
    written = run(folder, changed, tmp_path / "out.safetensors", targets=["ResnetBlock2D"], rank=32)
    assert [layer.path for layer in written.layers] == [path]
    live = copy.deepcopy(base)
    load_adapter(live, tmp_path / "out.safetensors")
    assert effect_error(live, path, difference(base, tuned, path)) < 1e-4


def test_header_names_both_models_and_hashes_the_base_weights(
    models: Callable[[str], Models], tmp_path: Path
) -> None:
    base, _, *folders = models("flux")
    run(*folders, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as content:
        header = content.metadata()
    assert header["model_family"] == "flux"
    assert header["base_model"] == str(folders[0])
    assert json.loads(header["extracted_from"]) == {"base": "base", "tuned": "tuned"}
    hashes = json.loads(header[adapter_file.HASH_KEY])
    assert hashes == {
        adapter_file.layer_name(path): adapter_file.weight_hash(base.get_parameter(f"{path}.weight"))
        for path in CHANGED["flux"]
    }
    assert header[labels.SPECIFICATION] == labels.VERSION
    assert header[labels.ARCHITECTURE].endswith("/lora")


def test_models_in_two_dtypes_are_named(models: Callable[[str], Models], tmp_path: Path) -> None:
    _, tuned, base, _ = models("flux")
    assert not [line for line in run(base, tmp_path / "tuned", tmp_path / "a").notes if "stored" in line]
    half = in_folder(tuned.to(torch.bfloat16), "flux", tmp_path / "half")
    notes = run(base, half, tmp_path / "b").notes
    assert any("float32 and bfloat16" in line for line in notes)


def test_text_encoders_that_differ_are_named(models: Callable[[str], Models], tmp_path: Path) -> None:
    *_, first, second = models("flux")
    for folder in (first, second):
        for name in ("text_encoder", "text_encoder_2"):
            (folder / name).mkdir()
            tensor = torch.ones(2) * (1 + (folder == second and name == "text_encoder_2"))
            save_file({"weight": tensor}, folder / name / "model.safetensors")
    notes = run(first, second, tmp_path / "out.safetensors").notes
    assert [line for line in notes if line.startswith("Text")] == [
        "Text encoders: text_encoder_2 differ; they are not extracted."
    ]
    shutil.copytree(first / "text_encoder_2", second / "text_encoder_2", dirs_exist_ok=True)
    notes = run(first, second, tmp_path / "equal.safetensors").notes
    assert not [line for line in notes if line.startswith("Text")]
    shutil.rmtree(second / "text_encoder_2")
    notes = run(first, second, tmp_path / "other.safetensors").notes
    assert [line for line in notes if "not compared" in line]


def test_models_that_make_no_lora_are_refused(models: Callable[[str], Models], tmp_path: Path) -> None:
    base, _, first, second = models("flux")
    output = tmp_path / "out.safetensors"
    other = in_folder(make("flux2"), "flux2", tmp_path / "other")
    with pytest.raises(ModelError, match="--base is of the family flux, --tuned is of the family flux2"):
        run(first, other, output)
    with pytest.raises(AdapterError, match="none of its"):
        run(first, first, output)
    with pytest.raises(AdapterError, match="rank 999 is above"):
        run(first, second, output, rank=999)
    with pytest.raises(AdapterError, match="rank 0"):
        run(first, second, output, rank=0)
    with pytest.raises(AdapterError, match="FluxAttension"):
        run(first, second, output, targets=["FluxAttension"])
    wide = in_file(base, "flux", tmp_path / "wide.safetensors", own=True)
    tensors = load_file(wide)
    key = f"{CHANGED['flux'][0]}.weight"
    save_file(tensors | {key: torch.cat([tensors[key]] * 2)}, wide)
    with pytest.raises(AdapterError, match="one architecture"):
        run(first, wide, output)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, wide)
    with pytest.raises(AdapterError, match=f"no layer {CHANGED['flux'][0]}"):
        run(first, wide, output)
    save_file(tensors | {"x_embedder.scale_weight": torch.ones(1)}, wide)
    with pytest.raises(ModelError, match="quantised"):
        run(first, wide, output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        run(tmp_path / "empty", second, output)
    (tmp_path / "empty" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ModelError, match="AutoencoderKL"):
        run(tmp_path / "empty", second, output)
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        run(first, second, output)
