"""Which folders are SDXL models, and what is said of those that are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.sections import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.sdxl.components import SDXLParts, find_parts

CopySDXL = Callable[[], Path]


def parts_of(folder: Path, **changes: object) -> SDXLParts:
    values = {"model_family": "sdxl", "pretrained_model_name_or_path": str(folder), **changes}
    return find_parts(ModelConfig.model_validate(values))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_find_parts_finds_every_component(tiny_sdxl: Path) -> None:
    parts = parts_of(tiny_sdxl)
    assert parts.unet.folder == tiny_sdxl / "unet"
    assert parts.tokenizer_2.folder == tiny_sdxl / "tokenizer_2"
    assert parts.empty_prompt_is_zero
    assert parts.prediction_type(None) == "epsilon"
    assert not parts.scheduler_is_zero_snr


@pytest.mark.parametrize(
    "component", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
)
def test_find_parts_names_a_missing_component(copied_sdxl: CopySDXL, component: str) -> None:
    folder = copied_sdxl()
    shutil.rmtree(folder / component)
    with pytest.raises(
        ModelError, match=rf"component {component} is missing: there is no folder {component}\."
    ):
        parts_of(folder)


def test_find_parts_refuses_a_model_of_another_pipeline(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ModelError, match=r"is a model for FluxPipeline.*model_family"):
        parts_of(folder)


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("unet", "_class_name", "FluxTransformer2DModel"),
        ("vae", "_class_name", "AutoencoderKLFlux2"),
        ("text_encoder_2", "architectures", ["T5EncoderModel"]),
        ("text_encoder", "architectures", None),
    ],
)
def test_find_parts_refuses_a_component_of_another_architecture(
    copied_sdxl: CopySDXL, component: str, key: str, value: object
) -> None:
    folder = copied_sdxl()
    edit(folder / component / "config.json", **{key: value})
    with pytest.raises(ModelError, match=f"component {component} .* and SDXL needs") as raised:
        parts_of(folder)
    named = value[0] if isinstance(value, list) else value or "of an unknown class"
    assert str(named) in str(raised.value)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("unet", "in_channels", 9, "in_channels is 9"),
        ("unet", "cross_attention_dim", 768, "cross_attention_dim is 768"),
        ("unet", "projection_class_embeddings_input_dim", 72, "projection_class_embeddings_input_dim is 72"),
        ("unet", "addition_embed_type", None, "without SDXL's size and text conditioning"),
        ("vae", "latent_channels", 16, "16"),
        ("text_encoder", "hidden_size", None, "no number for hidden_size"),
    ],
)
def test_find_parts_refuses_parts_that_do_not_fit(
    copied_sdxl: CopySDXL, file: str, key: str, value: object, message: str
) -> None:
    folder = copied_sdxl()
    edit(folder / file / "config.json", **{key: value})
    with pytest.raises(ModelError) as raised:
        parts_of(folder)
    assert message in str(raised.value)


def test_find_parts_refuses_another_number_of_timesteps(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=500)
    with pytest.raises(ModelError, match="num_train_timesteps is 500"):
        parts_of(folder)


def test_prediction_type_follows_the_user_then_the_model(copied_sdxl: CopySDXL) -> None:
    folder = copied_sdxl()
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    parts = parts_of(folder)
    assert parts.prediction_type(None) == "v_prediction"
    assert parts.prediction_type("epsilon") == "epsilon"
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="'sample' cannot be trained"):
        parts_of(folder).prediction_type(None)


@pytest.mark.parametrize("component", ["unet", "vae"])
@pytest.mark.parametrize("layout", ["whole model", "component", "named subfolder"])
def test_find_parts_takes_a_component_from_elsewhere(
    copied_sdxl: CopySDXL, tiny_sdxl: Path, component: str, layout: str
) -> None:
    other, subfolder = copied_sdxl(), None
    if layout == "component":
        other /= component
    if layout == "named subfolder":
        subfolder = "swapped"
        (other / component).rename(other / subfolder)
    parts = parts_of(
        tiny_sdxl,
        **{
            f"pretrained_{component}_model_name_or_path": str(other),
            f"pretrained_{component}_subfolder": subfolder,
        },
    )
    expected = other if layout == "component" else other / (subfolder or component)
    assert {"unet": parts.unet, "vae": parts.vae}[component].folder == expected


def test_find_parts_names_the_key_of_a_swapped_component(copied_sdxl: CopySDXL, tiny_sdxl: Path) -> None:
    other = copied_sdxl()
    edit(other / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(ModelError, match=r"^pretrained_vae_model_name_or_path .*AutoencoderTiny"):
        parts_of(tiny_sdxl, pretrained_vae_model_name_or_path=str(other / "vae"))
