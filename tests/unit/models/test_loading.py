"""Finding and loading the parts of a model, and what is said when one is not there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.loading import (
    ModelSource,
    find_component,
    guess_subfolder,
    load_weights,
    read_config,
    read_model_index,
)

UNET = UNet2DConditionModel
WEIGHTS = "diffusion_pytorch_model.safetensors"
CopySDXL = Callable[[], Path]


def find_unet(folder: Path, *, variant: str | None = None, strict_variant: bool = False) -> object:
    source = ModelSource(str(folder), variant=variant)
    return find_component("unet", source, component_type="diffusers", strict_variant=strict_variant)


def shard(folder: Path) -> None:
    """Split a component's weights into two files with an index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in half}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_read_model_index_names_the_pipeline(tiny_sdxl: Path) -> None:
    assert read_model_index(ModelSource(str(tiny_sdxl)))["_class_name"] == "StableDiffusionXLPipeline"


def test_read_model_index_refuses_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.safetensors is a file"):
        read_model_index(ModelSource(str(tmp_path / "model.safetensors")))


def test_read_model_index_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        read_model_index(ModelSource(str(tmp_path)))


def test_read_model_index_names_the_class_of_a_single_component(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ModelError, match=r"single component \(FluxTransformer2DModel\)"):
        read_model_index(ModelSource(str(tmp_path)))


def test_read_model_index_refuses_a_path_that_is_neither_folder_nor_repository(tmp_path: Path) -> None:
    missing = tmp_path / "there" / "is" / "nothing"
    with pytest.raises(ModelError, match="repository name") as raised:
        read_model_index(ModelSource(str(missing)))
    assert "pretrained_model_name_or_path" in str(raised.value)
    assert str(missing) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_read_config_refuses_what_is_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model_index\.json"):
        read_config(tmp_path / "model_index.json")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("unet", "component unet is missing: there is no folder unet"),
        (f"unet/{WEIGHTS}", f"unet holds config.json, but not {WEIGHTS}"),
        ("unet/config.json", f"unet holds {WEIGHTS}, but not config.json"),
    ],
)
def test_find_component_says_what_is_missing(copied_sdxl: CopySDXL, remove: str, message: str) -> None:
    folder = copied_sdxl()
    target = folder / remove
    target.rename(folder / "moved away")
    with pytest.raises(ModelError, match="unet") as raised:
        find_unet(folder)
    assert message in str(raised.value)


def test_find_component_says_that_pickle_files_are_never_loaded(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"Pickle.*safetensors"):
        find_unet(folder)


def test_find_component_takes_a_tokenizer_in_either_layout(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    source = ModelSource(str(folder))
    assert find_component("tokenizer", source, component_type="tokenizer").files
    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").rename(tokenizer / "vocab.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json or vocab\.json with merges\.txt"):
        find_component("tokenizer", source, component_type="tokenizer")
    (tokenizer / "merges.txt").write_text("")
    assert len(find_component("tokenizer", source, component_type="tokenizer").files) == 3


def test_find_component_prefers_the_variant_and_says_when_it_is_not_there(
    copied_sdxl: CopySDXL, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied_sdxl()
    source = ModelSource(str(folder), variant="fp16")
    with caplog.at_level(logging.WARNING):
        assert find_component("unet", source, component_type="diffusers").variant is None
    assert "unet has no fp16 weights" in caplog.text
    with pytest.raises(ModelError, match=r"not diffusion_pytorch_model\.fp16\.safetensors"):
        find_unet(folder, variant="fp16", strict_variant=True)
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    component = find_component("unet", source, component_type="diffusers", strict_variant=True)
    assert component.variant == "fp16"
    assert load_weights(UNET, component, dtype=torch.float16).dtype == torch.float16


def test_load_weights_reads_shards(copied_sdxl: CopySDXL, tiny_sdxl: Path) -> None:
    folder = copied_sdxl()
    shard(folder / "unet")
    sharded = load_weights(
        UNET,
        find_component("unet", ModelSource(str(folder)), component_type="diffusers"),
        dtype=torch.float32,
    )
    whole = load_weights(
        UNET,
        find_component("unet", ModelSource(str(tiny_sdxl)), component_type="diffusers"),
        dtype=torch.float32,
    )
    for name, weight in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], weight)


def test_find_component_misses_an_absent_shard(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    shard(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"unet .*not {WEIGHTS}"):
        find_unet(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "a pickle"])
def test_load_weights_refuses_a_damaged_file(copied_sdxl: CopySDXL, damage: str) -> None:
    folder = copied_sdxl()
    file = folder / "unet" / WEIGHTS
    content = file.read_bytes()
    damaged = {"truncated": content[:5000], "empty": b"", "garbage": b"\xff" * 100, "a pickle": b"\x80\x04N."}
    file.write_bytes(damaged[damage])
    component = find_component("unet", ModelSource(str(folder)), component_type="diffusers")
    with pytest.raises(ModelError, match="cannot be loaded as UNet2DConditionModel"):
        load_weights(UNET, component, dtype=torch.float32)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_load_weights_refuses_a_file_that_lacks_weights(copied_sdxl: CopySDXL, name: str) -> None:
    folder = copied_sdxl()
    component_type, stem = ("diffusers", WEIGHTS) if name == "unet" else ("transformers", "model.safetensors")
    weights = load_file(folder / name / stem)
    removed = sorted(weights)[3]
    del weights[removed]
    save_file(weights, folder / name / stem, metadata={"format": "pt"})
    component = find_component(name, ModelSource(str(folder)), component_type=component_type)
    loader = UNET if name == "unet" else CLIPTextModel
    with pytest.raises(ModelError, match=f"lacks 1 of the weights.*{removed}"):
        load_weights(loader, component, dtype=torch.float32)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_load_weights_refuses_weights_of_other_shapes(copied_sdxl: CopySDXL, name: str) -> None:
    folder = copied_sdxl()
    config_file = folder / name / "config.json"
    key = "cross_attention_dim" if name == "unet" else "intermediate_size"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {key: 48}))
    component_type = "diffusers" if name == "unet" else "transformers"
    component = find_component(name, ModelSource(str(folder)), component_type=component_type)
    loader = UNET if name == "unet" else CLIPTextModel
    with pytest.raises(ModelError, match=str(folder)):
        load_weights(loader, component, dtype=torch.float32)


def test_load_weights_draws_no_progress_bar_and_says_nothing(
    tiny_sdxl: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = ModelSource(str(tiny_sdxl))
    load_weights(UNET, find_component("unet", source, component_type="diffusers"), dtype=torch.bfloat16)
    encoder = find_component("text_encoder", source, component_type="transformers")
    load_weights(CLIPTextModel, encoder, dtype=torch.bfloat16)
    assert "".join(capfd.readouterr()) == ""


def test_identity_follows_the_content_and_not_the_place(copied_sdxl: CopySDXL) -> None:
    first, second = copied_sdxl(), copied_sdxl()
    identities = [
        find_component("vae", ModelSource(str(folder)), component_type="diffusers").identity()
        for folder in (first, second)
    ]
    assert identities[0] == identities[1]
    file = second / "vae" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert (
        find_component("vae", ModelSource(str(second)), component_type="diffusers").identity()
        != identities[0]
    )


def test_guess_subfolder_tells_a_whole_model_from_a_component(tiny_sdxl: Path) -> None:
    assert guess_subfolder(ModelSource(str(tiny_sdxl)), usual="vae") == "vae"
    assert guess_subfolder(ModelSource(str(tiny_sdxl / "vae")), usual="vae") == ""
