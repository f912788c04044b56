"""Size, scheduler and markers of a model, read from its files without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.weights_on_disk import markers, num_denoiser_weights, scheduler_config

SPEC = registry.specs()["sdxl"]


def model(source: Path | str, **keys: str) -> ModelConfig:
    return ModelConfig(model_family="sdxl", pretrained_model_name_or_path=str(source), **keys)


def save(file: Path, **shapes: tuple[int, ...]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
    return file


def test_the_shards_of_a_folder_are_added_up_and_its_variants_are_not(tmp_path: Path) -> None:
    save(tmp_path / "unet/model-00001-of-00002.safetensors", a=(2, 3), b=(4,))
    save(tmp_path / "unet/model-00002-of-00002.safetensors", c=(5,))
    shutil.copy(tmp_path / "unet/model-00002-of-00002.safetensors", tmp_path / "unet/model.fp16.safetensors")
    assert num_denoiser_weights(model(tmp_path), SPEC) == 15


@pytest.mark.parametrize(("family", "name"), [("sdxl", "unet"), ("flux", "transformer")])
def test_another_denoiser_counts_instead_of_the_models(tmp_path: Path, family: str, name: str) -> None:
    save(tmp_path / name / "model.safetensors", a=(2,))
    save(tmp_path / "other/model.safetensors", a=(7,))
    own = {"model_family": family, "pretrained_model_name_or_path": str(tmp_path)}
    other = {f"pretrained_{name}_model_name_or_path": str(tmp_path / "other")}
    spec = registry.specs()[family]
    assert num_denoiser_weights(ModelConfig.model_validate(own), spec) == 2
    assert num_denoiser_weights(ModelConfig.model_validate(own | other), spec) == 7


def test_of_a_single_file_the_denoiser_counts(tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", model__diffusion_model__x=(3,), first_stage_model__y=(50,))
    assert num_denoiser_weights(model(file), SPEC) == 3


def test_a_published_repository_has_its_published_size_and_another_none() -> None:
    assert (num_denoiser_weights(model(SPEC.flavours["turbo"]), SPEC) or 0) > 2e9
    assert num_denoiser_weights(model("somebody/else"), SPEC) is None


def test_a_folder_without_weights_has_no_known_size(tmp_path: Path) -> None:
    assert num_denoiser_weights(model(tmp_path), SPEC) is None


@pytest.mark.parametrize("family", ["sdxl", "flux", "flux2"])
def test_every_flavour_has_a_size(family: str) -> None:
    spec = registry.specs()[family]
    assert spec.num_weights.keys() == spec.flavours.keys()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for content in (
        b"",
        b"text instead",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b"{",
    ):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"a\.safetensors"):
            num_denoiser_weights(model(file), SPEC)


def test_the_scheduler_is_read_or_unknown(tmp_path: Path) -> None:
    assert scheduler_config(model("somebody/else")) is None
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    for content, expected in ((json.dumps({"shift": 3.0}), {"shift": 3.0}), ("[]", None), ("{", None)):
        file.write_text(content)
        assert scheduler_config(model(tmp_path)) == expected


def test_the_scheduler_of_a_single_file_is_that_of_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "named" / "scheduler").mkdir(parents=True)
    (tmp_path / "named" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    file = save(tmp_path / "a.safetensors", x=(1,))
    assert scheduler_config(model(file)) is None
    named = model(file, pretrained_config_name_or_path=str(tmp_path / "named"))
    assert scheduler_config(named) == {"shift": 3.0}


def test_the_markers_of_a_single_file_are_found(tmp_path: Path) -> None:
    assert markers(model(save(tmp_path / "a.safetensors", v_pred=(0,), x=(1,)))) == {"v_pred"}
    assert markers(model("somebody/else")) == frozenset()
