"""The CLIP score of images, by a tiny CLIP model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.clip_score import ClipScorer
from tests.unit.models.tiny_clip import save_tiny_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    files = {colour: tmp_path / f"{colour}.png" for colour in ("red", "blue")}
    for colour, file in files.items():
        Image.new("RGBA", (40, 56), colour).save(file)
    return files


def test_score_is_a_hundred_times_the_cosine_of_the_embeddings(folder: Path, images: dict[str, Path]) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    prompts = {"red": "a red cat", "blue": "a blue dog"}
    scores = ClipScorer(str(folder), device=CPU).scores(images, prompts)
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = (each.from_pretrained(folder) for each in (CLIPTokenizer, CLIPImageProcessorPil))
    for name, file in images.items():
        tokens = tokenizer([prompts[name]], return_tensors="pt")
        pixels = processor([Image.open(file).convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            text = model.text_projection(model.text_model(**tokens).pooler_output)[0]
            image = model.visual_projection(model.vision_model(**pixels).pooler_output)[0]
        cosine = float(text @ image / text.norm() / image.norm())
        assert scores[name] == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    assert 0 < max(scores.values()) <= 100


def test_opposite_embeddings_score_zero(folder: Path, images: dict[str, Path], tmp_path: Path) -> None:
    prompts = dict.fromkeys(images, "a red cat")
    opposite = save_tiny_clip(tmp_path / "opposite")
    weights = load_file(opposite / "model.safetensors")
    weights["text_projection.weight"] *= -1
    save_file(weights, opposite / "model.safetensors", {"format": "pt"})
    found = [ClipScorer(str(each), device=CPU).scores(images, prompts) for each in (folder, opposite)]
    for name in images:
        first, second = (each[name] for each in found)
        assert min(first, second) == 0 < max(first, second)


def test_prompt_beyond_the_limit_counts_up_to_it(folder: Path, images: dict[str, Path]) -> None:
    scorer = ClipScorer(str(folder), device=CPU)
    long, longer = ("a red cat " * times for times in (40, 80))
    first, second = (scorer.scores(images, dict.fromkeys(images, text)) for text in (long, longer))
    assert first == second


def test_model_without_safetensors_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pretrained_evaluation_model_name_or_path.*model\.safetensors"):
        ClipScorer(str(tmp_path), device=CPU)


def test_model_of_another_kind_is_refused_with_its_key(folder: Path, images: dict[str, Path]) -> None:
    (folder.parent / "torn").mkdir()
    torn = folder.parent / "torn"
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="pretrained_evaluation_model_name_or_path"):
        ClipScorer(str(torn), device=CPU).scores(images, dict.fromkeys(images, "a cat"))


def test_model_that_lacks_weights_is_refused_instead_of_made_up(
    images: dict[str, Path], tmp_path: Path
) -> None:
    partial = save_tiny_clip(tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    save_file(
        {key: weight for key, weight in weights.items() if not key.startswith("vision_model")},
        partial / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match="vision_model"):
        ClipScorer(str(partial), device=CPU).scores(images, dict.fromkeys(images, "a cat"))


def test_missing_repository_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="nobody/nothing"):
        ClipScorer("nobody/nothing", device=CPU)
