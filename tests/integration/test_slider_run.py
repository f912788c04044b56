"""A slider from the user's files to its images, on the tiny SDXL model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.errors import CheckpointError
from simpletuner.helpers.io.run_folder import PAGE_FILE, RUN_MANIFEST_FILE
from tests.integration.tiny_runs import TinyRun

STRENGTHS = {"more": 1.0, "less": -0.5, "plain": None}


@pytest.fixture
def datasets(tmp_path: Path) -> list[dict[str, object]]:
    """Two images of each direction and two neutral ones."""
    entries: list[dict[str, object]] = []
    for number, (name, strength) in enumerate(STRENGTHS.items()):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(2):
            pixels = np.random.default_rng(10 * number + index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        entries.append({"id": name, "instance_data_dir": str(folder), "slider_strength": strength})
    return entries


@pytest.mark.parametrize("recomputes", [True, False], ids=["checkpointed", "plain"])
def test_forward_and_backward_of_a_batch_have_its_strength(
    tmp_path: Path, datasets: list[dict[str, object]], recomputes: bool
) -> None:
    run = TinyRun(tmp_path, num_images=0)
    seen: list[float] = []
    with run.trainer(data_backend_config=datasets, gradient_checkpointing=recomputes) as trainer:
        module = trainer.trainable.lycoris_network.loras[0]  # type: ignore[union-attr]
        module.org_module[0].register_forward_pre_hook(lambda *_: seen.append(module.multiplier))
        batches = trainer.data.batches()
        given = []
        for _ in range(6):
            batch = next(batches)
            trainer.train_step(batch.to(trainer.accelerator.device))
            given.append(batch.strength)
        assert module.multiplier == 1
    assert set(given) == {1.0, -0.5}
    assert seen == [strength for strength in given for _ in range(2 if recomputes else 1)]


def digest(run: TinyRun, steps: int, datasets: list[dict[str, object]]) -> str:
    keys = {"gradient_accumulation_steps": 2, "lr_scheduler": "constant_with_warmup"}
    with run.trainer(max_train_steps=steps, data_backend_config=datasets, **keys) as trainer:
        trainer.run()
        return trainer.state_digest()


def test_a_slider_goes_on_as_if_it_had_not_been_interrupted_and_only_with_its_strengths(
    tmp_path: Path, datasets: list[dict[str, object]]
) -> None:
    whole, parts = (TinyRun(tmp_path / name, num_images=0) for name in ("whole", "parts"))
    expected = digest(whole, 4, datasets)
    digest(parts, 3, datasets)
    swapped = [{**entry, "slider_strength": entry["slider_strength"] and 2.0} for entry in datasets]
    with pytest.raises(CheckpointError, match="dataset less, slider_strength"):
        digest(parts, 4, swapped)
    assert digest(parts, 4, datasets) == expected


def test_images_are_generated_at_both_ends_and_say_so(
    tmp_path: Path, datasets: list[dict[str, object]]
) -> None:
    run = TinyRun(tmp_path, num_images=0)
    keys = {"validation_prompt": "a cat", "validation_resolution": "64", "validation_disable": False}
    with run.trainer(
        data_backend_config=datasets,
        max_train_steps=1,
        validation_num_inference_steps=2,
        learning_rate=0.1,
        lr_warmup_steps=0,
        **keys,
    ) as trainer:
        module = trainer.trainable.lycoris_network.loras[0]  # type: ignore[union-attr]
        used: list[float] = []

        def note(*_: object) -> None:
            if not torch.is_grad_enabled():
                used.append(module.multiplier)

        module.org_module[0].register_forward_pre_hook(note)
        assert trainer.run() == 0
    assert list(dict.fromkeys(used)) == [0.0, -0.5, 1.0]
    images = sorted((run.output_dir / "validation/step-1").glob("0*.png"))
    assert len({image.read_bytes() for image in images}) == len(images) == 2
    manifest = json.loads((run.output_dir / RUN_MANIFEST_FILE).read_text())
    assert [shot["strength"] for shot in manifest["shots"]] == [-0.5, 1.0]
    page = (run.output_dir / PAGE_FILE).read_text()
    assert "strength -0.5" in page
    assert "strength 1" not in page
