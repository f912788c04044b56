"""Runs whose captions change from pass to pass, with prompts of several chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.helpers.io.run_folder import ADAPTER_FILE, VALIDATION_FOLDER
from tests.integration.attached import command
from tests.integration.tiny_runs import TinyRun

PROMPT = ", ".join(["a photo of sks cat", *("a long list of words" for _ in range(20)), "on a mat"])
SHUFFLE = {"enable": True, "count": 2, "position_start": 1}


class TaggedRun(TinyRun):
    """A run on captions of more than 75 tokens, which are shuffled, thinned out and dropped."""

    def config(self, **overrides: object):  # type: ignore[no-untyped-def]
        """The configuration, with tags in the text files."""
        for index in range(self.num_images):
            tags = [f"tag{letter}{index} with words" for letter in "abcdefghij"]
            (self.folder / "images" / f"image{index}.txt").write_text(", ".join(["sks", *tags]))
        dataset = {
            "id": "pictures",
            "instance_data_dir": str(self.folder / "images"),
            "caption_shuffle": SHUFFLE,
            "caption_tag_dropout_rate": 0.3,
            "caption_dropout_probability": 0.2,
        }
        keys = {
            "data_backend_config": [dataset],
            "max_token_length": 150,
            "gradient_accumulation_steps": 2,
            "lr_scheduler": "constant",
            "validation_disable": False,
            "validation_prompt": PROMPT,
            "validation_resolution": 64,
            "validation_num_inference_steps": 2,
            "validation_guidance": 5.0,
            "disable_benchmark": True,
        }
        return super().config(**{**keys, **overrides})


@pytest.mark.reliability_row(4)
def test_variants_and_chunks_are_exact_on_resume_and_alike_in_training_validation_and_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = TaggedRun(tmp_path / "whole"), TaggedRun(tmp_path / "parts")
    assert whole.run() == 0
    assert parts.run(max_train_steps=2) == 0
    assert parts.run() == 0
    file = whole.output_dir / ADAPTER_FILE
    expected, found = load_file(file), load_file(parts.output_dir / ADAPTER_FILE)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["max_token_length"] == "150"
    sizes = ("--size", 64, "--steps", 2, "--guidance", 5, "--seed", 7, "--output", tmp_path / "out")
    assert command(monkeypatch, "sample", "--adapter", file, "--prompt", PROMPT, *sizes) == 0
    (validated,) = (whole.output_dir / VALIDATION_FOLDER).rglob("00-*.png")
    (sampled,) = (tmp_path / "out").iterdir()
    difference = np.asarray(Image.open(sampled)).astype(int) - np.asarray(Image.open(validated))
    assert np.abs(difference).max() <= 1
