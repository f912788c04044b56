"""Depth estimation by a real model at toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models import depth
from simpletuner.helpers.models.depth import DepthModels, grey


def save_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        initializer_range=0.5,
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}, ensure_multiple_of=8).save_pretrained(folder)


@pytest.fixture(autouse=True)
def without_models() -> None:
    DepthModels().unload()
    depth._identity.cache_clear()


def test_depth_is_the_models_and_fills_the_greys(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    values = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    models = DepthModels()
    found = np.asarray(models.estimate(image, tmp_path))
    assert found.shape == (48, 64, 3)
    assert (found.min(), found.max()) == (0, 255)
    assert (found == found[..., :1]).all()
    assert np.array_equal(found, np.asarray(models.estimate(image, tmp_path)))
    model = DPTForDepthEstimation.from_pretrained(tmp_path)
    processor = DPTImageProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        raw = model(**processor(images=image, return_tensors="pt")).predicted_depth[0]
    larger = torch.nn.functional.interpolate(
        raw[None, None], size=(48, 64), mode="bicubic", align_corners=False
    )[0, 0]
    assert np.abs(np.asarray(grey(larger.numpy()), dtype=int) - found).max() <= 1


def test_a_model_is_loaded_once_until_it_is_unloaded(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1)
    models, image = DepthModels(), Image.new("RGB", (32, 32))
    for _ in range(3):
        models.estimate(image, tmp_path)
    assert depth._loaded.cache_info()[:2] == (2, 1)
    models.unload()
    assert depth._loaded.cache_info().currsize == 0


def test_the_identity_of_a_model_is_its_content(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_model(tmp_path / name, seed)
    first, same, other = (DepthModels().identity(tmp_path / name) for name in "abc")
    assert first == same
    assert first != other


def test_depth_that_is_the_same_everywhere_is_black() -> None:
    with np.errstate(all="raise"):
        assert not np.asarray(grey(np.full((2, 3), 7, dtype=np.float32))).any()
    assert np.asarray(grey(np.array([[1, 2, 3]], dtype=np.float32)))[0, :, 0].tolist() == [0, 128, 255]


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        DepthModels().estimate(Image.new("RGB", (32, 32)), tmp_path)
