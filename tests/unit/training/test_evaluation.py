"""The means of an evaluation, and what validate says of evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.models import registry
from simpletuner.helpers.training.evaluation import summarised
from simpletuner.helpers.training.plan import plan_lines

LOSSES = torch.tensor([[1.0, 3.0], [5.0, 7.0], [2.0, 4.0]], dtype=torch.float64)
TIMESTEPS = torch.tensor([[100.0, 600.0], [100.0, 900.0], [499.0, 500.0]], dtype=torch.float64)


def test_losses_are_averaged_over_images_and_noise_levels() -> None:
    found = summarised(LOSSES, TIMESTEPS, num_held_out=2, image_set=9, step=3, seconds=0.5)
    assert (found.step, found.images, found.train_images, found.seconds) == (3, 2, 1, 0.5)
    assert (found.eval_loss, found.eval_train_loss, found.eval_gap) == (4.0, 3.0, 1.0)
    assert found.eval_loss_by_band == {"0-500": 3.0, "500-800": 3.0, "800-1000": 7.0}
    assert found.eval_train_loss_by_band == {"0-500": 2.0, "500-800": 4.0, "800-1000": None}
    assert found.curves == {
        "eval_loss": 4.0,
        "eval_train_loss": 3.0,
        "eval_gap": 1.0,
        "eval_loss_0-500": 3.0,
        "eval_loss_500-800": 3.0,
        "eval_loss_800-1000": 7.0,
        "eval_train_loss_0-500": 2.0,
        "eval_train_loss_500-800": 4.0,
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_image_without_a_finite_loss_counts_nowhere(bad: float) -> None:
    losses = LOSSES.clone()
    losses[1, 0] = bad
    found = summarised(losses, TIMESTEPS, num_held_out=2, image_set=9, step=3, seconds=0.5)
    assert (found.images, found.eval_loss, found.eval_train_loss) == (1, 2.0, 3.0)
    losses[0, 1] = bad
    nothing = summarised(losses, TIMESTEPS, num_held_out=2, image_set=9, step=3, seconds=0.5)
    assert (nothing.images, nothing.eval_loss, nothing.eval_gap) == (0, None, None)
    assert "eval_loss" not in nothing.curves
    json.dumps(nothing.curves, allow_nan=False)


def run_of(folder: Path, entries: list[dict[str, object]], **keys: Any) -> RunConfig:
    for name, number in (("images", 20), ("others", 3)):
        (folder / name).mkdir(exist_ok=True)
        for index in range(number):
            pixels = np.random.default_rng([index, number]).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    values = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": "simpletuner/demo/sdxl",
        "lora_type": "standard",
        "data_backend_config": [{"instance_data_dir": str(folder / "images")} | each for each in entries],
        "output_dir": str(folder / "output"),
        "cache_dir_vae": str(folder / "cache"),
        "resolution": 64,
        "aspect_bucket_alignment": 8,
        "max_train_steps": 120,
        **keys,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder / "config.json", families=registry.specs())


def lines(config: RunConfig) -> str:
    return "\n".join(plan_lines(config, registry.specs()["sdxl"]))


def test_the_plan_names_held_out_images_and_what_evaluations_cost(tmp_path: Path) -> None:
    others = {"id": "others", "instance_data_dir": str(tmp_path / "others"), "dataset_type": "eval"}
    keys = {"eval_epoch_interval": 2, "eval_timesteps": 5, "train_batch_size": 4}
    text = lines(run_of(tmp_path, [{"id": "mine"}, others], **keys))
    assert "others: 3 images, 3 held out" in text
    row = "evaluation  3 of 3 held-out images and 3 training images, before step 1, every 100 steps, "
    assert f"{row}every 2 epochs and at the end" in text
    assert "5 noise levels of each: 30 predictions without gradients each time, 4 at once" in text
    assert "metrics.jsonl, evaluations.jsonl, report.html" in text
    own = lines(run_of(tmp_path, [{"id": "mine"}, others | {"train_batch_size": 1}], **keys))
    assert "without gradients each time, 1 to 4 at once" in own
    assert "of 5 batches" in text, "the 20 images that are trained, in batches of 4"


def test_the_plan_counts_the_images_that_a_share_leaves_for_training(tmp_path: Path) -> None:
    text = lines(run_of(tmp_path, [{"id": "mine", "eval_share": 0.5}], num_eval_images=2))
    (held_out,) = [int(word) for word in text.partition("mine: 20 images, ")[2].split()[:1]]
    assert 4 < held_out < 16
    assert f"evaluation  2 of {held_out} held-out images and 2 training images" in text
    assert f"of {20 - held_out} batches" in text


def test_the_plan_of_a_run_without_held_out_images_says_nothing(tmp_path: Path) -> None:
    assert "evaluation" not in lines(run_of(tmp_path, [{"id": "mine"}]))
    off = run_of(tmp_path, [{"id": "mine", "eval_share": 0.5}], eval_loss_disable=True)
    assert "evaluation  none: eval_loss_disable" in lines(off)


def test_keys_of_evaluations_without_held_out_images_are_named(tmp_path: Path) -> None:
    text = lines(run_of(tmp_path, [{"id": "mine"}], eval_steps_interval=10, num_eval_images=4))
    assert "warning     eval_steps_interval, num_eval_images: no effect without held-out images" in text


def test_a_share_that_holds_out_nothing_is_warned_of(tmp_path: Path) -> None:
    text = lines(run_of(tmp_path, [{"id": "mine", "eval_share": 1e-6}]))
    assert "warning     Dataset mine: eval_share 1e-06 holds out none of its 20 images" in text
    assert "evaluation  none: no image is held out" in text


def test_held_out_images_that_were_not_read_may_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.preview.MOST_HEADERS", 1)
    text = lines(run_of(tmp_path, [{"id": "mine", "eval_share": 1e-6}]))
    assert "evaluation  of the images that the run finds" in text


def test_a_share_that_leaves_nothing_to_train_is_refused(tmp_path: Path) -> None:
    config = run_of(tmp_path, [{"id": "mine", "eval_share": 0.9999}])
    with pytest.raises(DataError, match="'mine': its 20 images are held out"):
        lines(config)


@pytest.mark.parametrize("held_first", [False, True])
def test_copies_of_held_out_images_are_not_counted_as_trained(tmp_path: Path, held_first: bool) -> None:
    others = {"id": "others", "instance_data_dir": str(tmp_path / "others"), "dataset_type": "eval"}
    config = run_of(tmp_path, [{"id": "mine"}, others][:: -1 if held_first else 1])
    for index in (0, 2):
        (tmp_path / "images" / f"{index}.png").write_bytes((tmp_path / f"others/{index}.png").read_bytes())
    text = lines(config)
    assert "mine: 20 images, 2 not trained, as another dataset holds out the same bytes" in text
    assert "of 18 batches" in text


def test_a_dataset_of_copies_of_held_out_images_is_refused(tmp_path: Path) -> None:
    others = {"id": "others", "instance_data_dir": str(tmp_path / "others"), "dataset_type": "eval"}
    copies = {"id": "copies", "instance_data_dir": str(tmp_path / "others")}
    with pytest.raises(DataError, match=r"'copies': its 3 images are held out \(another dataset holds out"):
        lines(run_of(tmp_path, [{"id": "mine"}, copies, others]))


def test_regularisation_is_balanced_with_the_images_that_are_trained(tmp_path: Path) -> None:
    others = {"id": "class", "instance_data_dir": str(tmp_path / "others"), "is_regularisation_data": True}
    entries = [{"id": "mine", "eval_share": 0.5}, others]
    text = lines(run_of(tmp_path, entries, regularisation_target="data"))
    (held_out,) = [int(word) for word in text.partition("mine: 20 images, ")[2].split()[:1]]
    assert f"of {2 * (20 - held_out)} batches" in text
