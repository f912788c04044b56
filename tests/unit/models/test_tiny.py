"""The tiny SDXL, and the pictures of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from simpletuner.demo import make
from simpletuner.helpers.models.sdxl.tiny import make_unet
from simpletuner.helpers.models.tiny_parts import fill_weights, make_clip_tokenizer


def test_the_demo_photograph_is_whole_and_its_licence_is_named() -> None:
    folder = make.FOLDER / "photo"
    with Image.open(folder / "cat.jpg") as picture:
        picture.load()
        assert picture.size == (451, 300)
    assert (folder / "cat.txt").read_text(encoding="utf-8") == make.CAPTION
    assert "CC0" in (folder / "LICENSE.md").read_text(encoding="utf-8")


def test_the_demo_toy_is_what_make_writes(tmp_path: Path) -> None:
    make.make_character(tmp_path)
    with Image.open(make.FOLDER / "toy" / "toy.png") as shipped, Image.open(tmp_path / "toy.png") as made:
        assert shipped.size == (64, 64)
        assert shipped.tobytes() == made.tobytes()
    caption = (make.FOLDER / "toy" / "toy.txt").read_text(encoding="utf-8")
    assert caption == (tmp_path / "toy.txt").read_text(encoding="utf-8")
    assert caption == "a sks toy\n"


def test_rank_8_fits_every_linear_layer_of_the_usual_targets() -> None:
    targets = [each for each in make_unet().modules() if type(each).__name__ in ("Attention", "FeedForward")]
    linears = [each for target in targets for each in target.modules() if isinstance(each, torch.nn.Linear)]
    assert sum(type(each).__name__ == "Attention" for each in targets) >= 8
    assert min(min(linear.weight.shape) for linear in linears) >= 16


def test_fill_weights_stays_within_the_bound_of_the_fan_in() -> None:
    unet: UNet2DConditionModel = make_unet()
    fill_weights(unet, seed=0)
    weight = unet.conv_in.weight  # [16, 4, 3, 3]
    assert weight.abs().max() <= 1 / 6
    assert weight.std().item() == pytest.approx(1 / 6 / 3**0.5, rel=0.1)
    assert torch.equal(unet.conv_in.bias, torch.zeros(16))
    assert torch.equal(unet.conv_norm_out.weight, torch.ones(16))


def test_the_tokenizer_knows_its_words_and_can_spell_the_rest() -> None:
    tokenizer = make_clip_tokenizer(pad="!")
    assert tokenizer.tokenize("a photo of a Cat") == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>"]
    assert tokenizer.unk_token_id not in tokenizer("naïve 猫!", add_special_tokens=False).input_ids
    ids = tokenizer("cat", padding="max_length").input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert ids[2] == tokenizer.eos_token_id
    assert set(ids[3:]) == {tokenizer.convert_tokens_to_ids("!")}
