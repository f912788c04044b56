"""Reference images of validation prompts: how they are cut, and what a generated image depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.configuration.schema.sections import ValidationConfig, ValidationPrompt
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.sampling.prompts import PromptSpec, expand_prompts, pipeline_type
from simpletuner.helpers.sampling.references import side_by_side, with_references

SQUARE = Size(128, 128)


def image(file: Path, size: Size, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    Image.fromarray(values).save(file)
    return file


def prompts_of(*files: Path, sizes: str = "128") -> tuple[PromptSpec, ...]:
    prompt = ValidationPrompt(name="edit", text="make it red", images=files)
    return expand_prompts(ValidationConfig(prompts=(prompt,), validation_resolution=sizes), seed=0)


@pytest.mark.parametrize(
    ("stored", "fills_image", "expected"),
    [
        (SQUARE, True, SQUARE),
        (Size(256, 128), True, SQUARE),
        (SQUARE, False, SQUARE),
        (Size(256, 128), False, Size(176, 96)),  # of 128 x 128 px: 181.0 x 90.5, in multiples of 16
        (Size(50, 100), False, Size(96, 176)),
    ],
)
def test_a_reference_has_the_size_of_the_image_or_its_aspect_and_area(
    tmp_path: Path, stored: Size, fills_image: bool, expected: Size
) -> None:
    file = image(tmp_path / "a.png", stored)
    (prompt,) = with_references(prompts_of(file), alignment=16, fills_image=fills_image)
    (reference,) = prompt.references
    assert reference.pixels.shape == (3, expected.height, expected.width)
    assert -1 <= reference.pixels.min() < reference.pixels.max() <= 1
    assert reference.name == "a.png"


def test_a_reference_of_the_very_size_keeps_its_colours(tmp_path: Path) -> None:
    file = image(tmp_path / "a.png", SQUARE)
    (prompt,) = with_references(prompts_of(file), alignment=64, fills_image=False)
    stored = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(prompt.references[0].pixels, stored / 127.5 - 1)


def test_a_reference_is_cut_from_its_centre(tmp_path: Path) -> None:
    values = np.zeros((128, 384, 3), dtype=np.uint8)
    values[:, 128:256] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    (prompt,) = with_references(prompts_of(tmp_path / "a.png"), alignment=16, fills_image=True)
    assert prompt.references[0].pixels.mean() == 1


def test_prompts_differ_by_the_content_of_their_references_and_by_the_cut(tmp_path: Path) -> None:
    one, other = image(tmp_path / "a.png", Size(96, 128), 1), image(tmp_path / "b.png", Size(96, 128), 2)
    copy = image(tmp_path / "c.png", Size(96, 128), 1)

    def found(*files: Path, fills_image: bool = True) -> tuple[str, ...]:
        (prompt,) = with_references(prompts_of(*files), alignment=16, fills_image=fills_image)
        return tuple(each.digest for each in prompt.references)

    assert found(one) == found(copy) != found(other)
    assert found(one) != found(one, fills_image=False)
    assert found(one, other) == (*found(one), *found(other))


def test_a_file_is_read_once_and_cut_once_for_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, reads = image(tmp_path / "a.png", SQUARE), []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read(path))
    prompts = with_references(prompts_of(file, file, sizes="128,64"), alignment=16, fills_image=True)
    assert reads == [file]
    (first, again), (small, _) = (prompt.references for prompt in prompts)
    assert first is again
    assert small.pixels.shape == (3, 64, 64)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("<html>")
    with pytest.raises(DataError, match=r"a\.png.*reference image"):
        with_references(prompts_of(file), alignment=16, fills_image=True)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.png.*reference image"):
        with_references(prompts_of(file), alignment=16, fills_image=True)


def test_prompts_without_references_stay_as_they_are_and_need_no_other_pipeline(tmp_path: Path) -> None:
    plain = prompts_of()
    assert with_references(plain, alignment=16, fills_image=True) == plain
    assert pipeline_type(plain) == "text2image"
    edits = with_references(prompts_of(image(tmp_path / "a.png", SQUARE)), alignment=16, fills_image=True)
    assert pipeline_type((*plain, *edits)) == "edit"
    assert "a.png" in edits[0].label
    assert plain[0].label.count("\n") == 1


def test_references_are_shown_side_by_side_no_longer_than_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (128, 64), "red").save(tmp_path / "red.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    files = tmp_path / "red.png", tmp_path / "blue.png"
    (prompt,) = with_references(prompts_of(*files, sizes="64"), alignment=16, fills_image=False)
    shown = side_by_side(prompt)
    assert shown is not None
    assert shown.width == 64
    assert shown.getpixel((0, 0)) == (255, 0, 0)
    assert shown.getpixel((63, shown.height - 1)) == (0, 0, 255)
    assert side_by_side(replace(prompt, references=prompt.references[:1])).size == (64, 32)
    assert side_by_side(replace(prompt, references=())) is None
