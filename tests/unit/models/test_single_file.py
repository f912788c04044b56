"""Models in one .safetensors file: the same weights as the folder's, and what is refused unread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import single_file
from simpletuner.helpers.models.flux.tiny import make_transformer
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.single_file import DENOISER_PREFIX, SingleFile, load_single_file
from tests.integration.original_layout import (
    diffusers_tensors,
    save_whole_checkpoint,
    unet_tensors,
    vae_tensors,
    with_prefix,
)

MakeSDXL = Callable[..., SDXL]
WEIGHTS = "*.safetensors"


@pytest.fixture
def configuration(copied_sdxl: Callable[[], Path]) -> Path:
    """The tiny model's folder without any weights."""
    folder = copied_sdxl()
    for file in folder.rglob(WEIGHTS):
        file.unlink()
    return folder


@pytest.fixture
def whole(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """The tiny model as one checkpoint of the original layout."""
    file = tmp_path / "whole.safetensors"
    save_whole_checkpoint(tiny_sdxl, file)
    return file


def parts(family: SDXL) -> dict[str, nn.Module]:
    """The models of a family; weights are copied, since a CPU rounds by where a mapped one begins."""
    family.load_vae()
    family.load_text_encoders()
    models: dict[str, nn.Module] = {
        "unet": family.load_denoiser(),
        "vae": family.vae,
        "text_encoder": family.prompt_encoder.text_encoder,
        "text_encoder_2": family.prompt_encoder.text_encoder_2,
    }
    for model in models.values():
        model.load_state_dict({key: each.clone() for key, each in model.state_dict().items()}, assign=True)
    return models


def predictions(family: SDXL) -> list[Tensor]:
    """What the UNet and both encoders of a family make of fixed inputs."""
    generator, unet = torch.Generator().manual_seed(0), parts(family)["unet"]
    (text,) = family.encode_prompts(["a cat"])
    latents = family.encode_images(torch.randn(1, 3, 64, 64, generator=generator))
    assert text.pooled is not None
    added = {"text_embeds": text.pooled, "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        noise = unet(latents, 500, encoder_hidden_states=text.prompt_embeds, added_cond_kwargs=added).sample
    return [latents, text.prompt_embeds, text.pooled, noise]


def weights(family: SDXL) -> Mapping[str, Tensor]:
    models = parts(family).items()
    return {f"{part}.{key}": tensor for part, model in models for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_checkpoint_has_the_weights_of_the_folder_to_the_last_bit(
    sdxl: MakeSDXL, whole: Path, configuration: Path, dtype: torch.dtype
) -> None:
    folder, file = (
        sdxl(weight_dtype=dtype),
        sdxl(whole, pretrained_config_name_or_path=str(configuration), weight_dtype=dtype),
    )
    expected, found = weights(folder), weights(file)
    assert expected.keys() == found.keys()
    assert not [key for key in expected if not torch.equal(expected[key], found[key])]
    assert {tensor.dtype for key, tensor in found.items() if key.startswith("unet")} == {dtype}


def test_whole_checkpoint_predicts_what_the_folder_predicts(
    sdxl: MakeSDXL, whole: Path, configuration: Path
) -> None:
    file = sdxl(whole, pretrained_config_name_or_path=str(configuration))
    assert all(torch.equal(*pair) for pair in zip(predictions(sdxl()), predictions(file), strict=True))


@pytest.mark.parametrize("prefix", ["", DENOISER_PREFIX])
@pytest.mark.parametrize("names", [unet_tensors, lambda folder: diffusers_tensors(folder / "unet")])
def test_unet_file_of_every_layout_predicts_what_the_folder_predicts(
    sdxl: MakeSDXL,
    tiny_sdxl: Path,
    tmp_path: Path,
    prefix: str,
    names: Callable[[Path], Mapping[str, Tensor]],
) -> None:
    save_file(with_prefix(prefix, names(tiny_sdxl)), tmp_path / "unet.safetensors")
    file = sdxl(pretrained_unet_model_name_or_path=str(tmp_path / "unet.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(predictions(sdxl()), predictions(file), strict=True))
    assert file.text_identity == sdxl().text_identity
    assert file.vae_identity == sdxl().vae_identity


def test_unet_is_taken_from_a_whole_checkpoint(sdxl: MakeSDXL, whole: Path) -> None:
    file = sdxl(pretrained_unet_model_name_or_path=str(whole))
    assert all(torch.equal(*pair) for pair in zip(predictions(sdxl()), predictions(file), strict=True))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_vae_file_encodes_as_the_folder_does(
    sdxl: MakeSDXL, tiny_sdxl: Path, tmp_path: Path, prefix: str
) -> None:
    tensors = with_prefix(prefix, vae_tensors(tiny_sdxl))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    file = sdxl(pretrained_vae_model_name_or_path=str(tmp_path / "vae.safetensors"))
    assert torch.equal(predictions(sdxl())[0], predictions(file)[0])
    assert file.vae_identity != sdxl().vae_identity


def test_transformer_file_in_diffusers_names_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = make_transformer()
    transformer.save_config(tmp_path)
    tensors = transformer.state_dict()
    save_file(with_prefix(DENOISER_PREFIX, tensors), tmp_path / "t.safetensors")
    file = SingleFile(tmp_path / "t.safetensors", DENOISER_PREFIX)
    loaded = load_single_file(FluxTransformer2DModel, file, folder=tmp_path, dtype=torch.float32)
    assert loaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("markers", "wanted", "prediction", "zero_snr"),
    [
        ((), None, "epsilon", False),
        ((), "v_prediction", "v_prediction", False),
        (("v_pred",), None, "v_prediction", False),
        (("v_pred", "ztsnr"), None, "v_prediction", True),
        (("v_pred",), "epsilon", "epsilon", False),
    ],
)
def test_prediction_type_is_the_users_else_the_files_else_the_configurations(
    sdxl: MakeSDXL,
    tiny_sdxl: Path,
    configuration: Path,
    tmp_path: Path,
    markers: tuple[str, ...],
    wanted: str | None,
    prediction: str,
    zero_snr: bool,
) -> None:
    file = tmp_path / "marked.safetensors"
    save_whole_checkpoint(tiny_sdxl, file, markers=markers)
    family = sdxl(file, pretrained_config_name_or_path=str(configuration), prediction_type=wanted)
    assert family._prediction == prediction
    assert family._zero_snr == zero_snr


def test_identities_change_with_the_file_and_with_its_configuration_alone(
    sdxl: MakeSDXL, whole: Path, configuration: Path
) -> None:
    def identities() -> tuple[str, str]:
        family = sdxl(whole, pretrained_config_name_or_path=str(configuration))
        return family.vae_identity, family.text_identity

    first = identities()
    moved = shutil.move(whole, whole.with_name("moved.safetensors"))
    shutil.copy(moved, whole)
    assert identities() == first
    whole.write_bytes(whole.read_bytes()[:-1] + b"\x7f")
    changed = identities()
    assert changed[0] != first[0]
    assert changed[1] != first[1]
    vae = configuration / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.5}))
    assert identities() == (identities()[0], changed[1])
    assert identities()[0] != changed[0]


def test_configuration_comes_from_the_flavours_repository_when_none_is_given(
    sdxl: MakeSDXL, whole: Path
) -> None:
    with pytest.raises(ModelError, match=r"model_flavour stabilityai/sdxl-turbo: .* HF_HUB_OFFLINE is set"):
        sdxl(whole, model_flavour="turbo")


def test_file_without_a_needed_weight_is_refused(
    sdxl: MakeSDXL, tiny_sdxl: Path, configuration: Path, tmp_path: Path
) -> None:
    for name in ("conditioner.embedders.1.model.ln_final.weight", f"{DENOISER_PREFIX}out.2.bias"):
        file = tmp_path / "broken.safetensors"
        save_whole_checkpoint(tiny_sdxl, file, without=name)
        family = sdxl(file, pretrained_config_name_or_path=str(configuration))
        with pytest.raises(ModelError, match=rf"{file} (lacks 1 of|cannot be loaded as)"):
            predictions(family)


def test_file_of_another_shape_is_refused_with_its_configuration_named(
    sdxl: MakeSDXL, whole: Path, configuration: Path
) -> None:
    config = configuration / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
    family = sdxl(whole, pretrained_config_name_or_path=str(configuration))
    with pytest.raises(ModelError, match=r"CLIPTextModel .*text_encoder:"):
        family.load_text_encoders()


@pytest.mark.parametrize("prefix", ["", DENOISER_PREFIX])
def test_file_with_more_weights_than_its_configuration_has_places_for_is_refused(
    tmp_path: Path, prefix: str
) -> None:
    make_transformer(has_guidance=False).save_config(tmp_path)
    tensors = make_transformer(has_guidance=True).state_dict()
    num_surplus = sum(tensor.numel() for key, tensor in tensors.items() if ".guidance_embedder." in key)
    save_file(with_prefix(prefix, tensors), tmp_path / "t.safetensors")
    file = SingleFile(tmp_path / "t.safetensors", DENOISER_PREFIX)
    with pytest.raises(ModelError, match=rf"t.safetensors has {num_surplus} weights more than .*{tmp_path}"):
        load_single_file(FluxTransformer2DModel, file, folder=tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"input_blocks.0.0.weight": torch.zeros(4, 4, dtype=torch.uint8)},
        {"input_blocks.0.0.weight": torch.zeros(4), "input_blocks.0.0.scale_weight": torch.ones(1)},
        {"scaled_fp8": torch.zeros(2), "input_blocks.0.0.weight": torch.zeros(4)},
    ],
)
def test_quantised_file_is_refused(sdxl: MakeSDXL, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "q.safetensors")
    family = sdxl(pretrained_unet_model_name_or_path=str(tmp_path / "q.safetensors"))
    with pytest.raises(ModelError, match=r"are quantised .* base_model_precision"):
        family.load_denoiser()


def test_header_that_would_fill_the_memory_is_refused_before_it_is_read(
    sdxl: MakeSDXL, tmp_path: Path
) -> None:
    file = tmp_path / "huge.safetensors"
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=r"\b1099511627776 bytes.*\b16777216\b"):
        sdxl(pretrained_unet_model_name_or_path=str(file)).load_denoiser()
    file.write_bytes(b"{}")
    with pytest.raises(ModelError, match=r"safetensors file"):
        single_file.names_in(file)
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        single_file.names_in(file)


@pytest.mark.reliability_row(23)
def test_a_hostile_name_is_shortened_and_harmless_in_the_message(tmp_path: Path) -> None:
    save_file({"\x1b[2J\n" + "x" * 100_000 + ".scale_weight": torch.ones(1)}, tmp_path / "t.safetensors")
    with pytest.raises(ModelError) as caught:
        SingleFile(tmp_path / "t.safetensors", DENOISER_PREFIX).tensors()
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".gguf", ".CKPT"])
def test_pickles_and_gguf_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"model{suffix}").touch()
    for key in ("pretrained_model_name_or_path", "pretrained_unet_model_name_or_path"):
        values = {"model_family": "sdxl", "pretrained_model_name_or_path": "owner/name"}
        with pytest.raises(ValidationError, match="pickles can run code"):
            ModelConfig.model_validate(values | {key: str(tmp_path / f"model{suffix}")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrained_model_name_or_path": "missing.safetensors"},
            "not found.*missing.safetensors",
        ),
        ({"pretrained_model_name_or_path": "text.json"}, r"is a file\. Give a folder"),
        ({"pretrained_config_name_or_path": "owner/name"}, "pretrained_model_name_or_path is a single file"),
        (
            {
                "pretrained_model_name_or_path": "a.safetensors",
                "pretrained_config_name_or_path": "a.safetensors",
            },
            "is a file. Give a folder",
        ),
    ],
)
def test_sources_that_are_no_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.json", "a.safetensors"):
        (tmp_path / name).touch()
    values = {"model_family": "sdxl", "pretrained_model_name_or_path": "owner/name"}
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values | changes)
