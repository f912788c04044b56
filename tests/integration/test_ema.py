"""Runs with a moving average: exact on resume, files and images of its own, and no effect on training."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.helpers.adapters.files.inspection import inspect
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.io.run_folder import (
    ADAPTER_FILE,
    COMFYUI_FILE,
    EMA_ADAPTER_FILE,
    EMA_COMFYUI_FILE,
    checkpoint_folder,
)
from simpletuner.helpers.reporting.html_report.folder import read_run
from simpletuner.helpers.sampling.validation_sampler import ValidationSampler
from simpletuner.helpers.training.build import build_ema
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.test_validation import PICTURES
from tests.integration.tiny_runs import TinyRun

pytestmark = pytest.mark.usefixtures("shared_caches")

KEYS = {"use_ema": True, "lr_scheduler": "constant", "learning_rate": 1e-2}
VARIANTS = {
    "T-LoRA, accumulating": {"gradient_accumulation_steps": 2, "ema_update_interval": 2},
    "LoRA": {"lora_type": "standard", "lora_rank": 4, "use_dora": True},
}


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path / "run", keys=KEYS)


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [weight.detach().clone() for weight in trainer.trainable.parameters()]


def files_of(folder: Path, *names: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / name) for name in names or (ADAPTER_FILE, EMA_ADAPTER_FILE)]


def are_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_run_with_an_average_resumes_exactly_with_images_in_one_of_two_runs(
    run: TinyRun, tmp_path: Path, keys: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TinyRun(tmp_path / "whole", keys=KEYS | keys)
    with whole.trainer(max_train_steps=4) as trainer:
        trainer.run()
        expected = trainer.state_digest()
    shown: list[list[Tensor]] = []
    monkeypatch.setattr(ValidationSampler, "generate_all", lambda *_, **__: shown.append(weights_of(trainer)))
    keys = keys | PICTURES | {"validation_step_interval": 1, "disable_benchmark": True}
    for steps in (2, 4):
        with run.trainer(max_train_steps=steps, **keys) as trainer:
            trainer.run()
            digest, trained = trainer.state_digest(), weights_of(trainer)
            assert trainer.state.ema is not None
            with trainer.state.ema.weights():
                averaged = weights_of(trainer)
    assert digest == expected
    assert len(shown) == 2 * 4
    assert all(map(torch.equal, shown[-2], trained))
    assert all(map(torch.equal, shown[-1], averaged))
    assert not any(map(torch.equal, trained, averaged))
    for ours, theirs in zip(files_of(run.output_dir), files_of(whole.output_dir), strict=True):
        assert are_equal(ours, theirs)


def test_average_changes_nothing_of_the_training(run: TinyRun, tmp_path: Path) -> None:
    plain = TinyRun(tmp_path / "plain", keys=KEYS | {"use_ema": False})
    plain.run(max_train_steps=3)
    run.run(max_train_steps=3)
    assert are_equal(*(files_of(each.output_dir, ADAPTER_FILE)[0] for each in (run, plain)))
    assert run.log() == plain.log()
    assert not (plain.output_dir / EMA_ADAPTER_FILE).exists()


def test_file_of_a_t_lora_has_the_average_of_its_differences(run: TinyRun) -> None:
    with run.trainer(max_train_steps=1) as trainer:
        start = weights_of(trainer)
        trainer.run()
        (layer, *_) = (module for module in trainer.denoiser.modules() if isinstance(module, TLoraLayer))
        trained = weights_of(trainer)
    assert not any(weight.any() for weight in start), "a T-LoRA starts at differences of zero"
    plain, average = files_of(run.output_dir)
    name = layer.lora_name
    # After one update the average is 0.1 of the start and 0.9 of the weights.
    expected = layer.base_q + 0.9 * layer.delta_q.detach()
    torch.testing.assert_close(average[f"{name}.q_layer.weight"], expected, rtol=0, atol=1e-7)
    assert torch.equal(plain[f"{name}.q_layer.weight"], layer.base_q + layer.delta_q.detach())
    assert torch.equal(average[f"{name}.base_q"], plain[f"{name}.base_q"])
    assert any(weight.any() for weight in trained)


def test_main_exchanges_the_two_files_in_every_layout(run: TinyRun, tmp_path: Path) -> None:
    other = TinyRun(tmp_path / "main", keys=KEYS)
    keys = {"max_train_steps": 2, "lora_format": "comfyui"}
    run.run(**keys)
    other.run(**keys, ema_adapter_file="main")
    for names in ((ADAPTER_FILE, EMA_ADAPTER_FILE), (COMFYUI_FILE, EMA_COMFYUI_FILE)):
        plain, average = files_of(run.output_dir, *names)
        first, second = files_of(other.output_dir, *names)
        assert not are_equal(plain, average)
        assert are_equal(first, average)
        assert are_equal(second, plain)
    for each in (run, other):
        saved, final = (
            files_of(folder) for folder in (checkpoint_folder(each.output_dir, 2), each.output_dir)
        )
        assert all(map(are_equal, saved, final))
    for name in (ADAPTER_FILE, EMA_ADAPTER_FILE, COMFYUI_FILE, EMA_COMFYUI_FILE):
        found = [inspect(each.output_dir / name).training["adapter_weights"] for each in (run, other)]
        assert found == (["ema", "plain"] if ".ema." in name else ["plain", "ema"])
    summaries = [json.loads((each.output_dir / "finished.json").read_text()) for each in (run, other)]
    assert [Path(each["ema"] or each["plain"]).name for each in summaries] == [EMA_ADAPTER_FILE] * 2
    assert [each["plain"] is None for each in summaries] == [True, False]
    assert all(len(each["files"]) == 4 for each in summaries)


@pytest.mark.parametrize(
    ("choice", "folders", "columns"),
    [("none", [""], 2), ("ema_only", ["ema"], 2), ("comparison", ["", "ema"], 3)],
)
def test_images_of_the_average_have_a_column_of_their_own(
    run: TinyRun, choice: str, folders: list[str], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    with run.trainer(**PICTURES, max_train_steps=2, ema_validation=choice) as trainer:
        assert trainer.validation.images_left(0, max_steps=2) == len(folders)
        with torch.no_grad():
            for weight in trainer.trainable.parameters():
                weight += 0.2  # the average stays behind
        monkeypatch.setattr(trainer.trackers, "log_images", lambda _, images: logged.extend(images))
        trainer.run()
    assert [name.endswith("-ema") for name in logged] == [False, *(bool(name) for name in folders)]
    step = run.output_dir / "validation" / "step-2"
    pixels = {
        name: Image.open(file).tobytes() for name in ("", "ema") for file in (step / name).glob("*seed*.png")
    }
    assert list(pixels) == folders
    assert len(set(pixels.values())) == len(folders)
    with Image.open(step / "grid.png") as grid:
        assert grid.width == 200 + 8 + columns * (128 + 8)
    (row,) = read_run(run.output_dir).images
    assert sorted(row.by_column) == [("", 2, bool(name)) for name in folders]
    assert ("step 2, EMA" in (run.output_dir / "report.html").read_text()) is ("ema" in folders)


def test_images_of_the_average_of_a_later_step_are_removed_with_the_others(run: TinyRun) -> None:
    folder = run.output_dir / "validation" / "step-5"
    with run.trainer(**PICTURES) as trainer:
        trainer.validation.run(5)
        assert list((folder / "ema").glob("*.png"))
        trainer.validation.start(0)
    assert not folder.exists()


def test_step_that_the_scaler_skips_leaves_the_average(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with run.trainer() as trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        unscale = functools.partial(scaler.unscale_, trainer.state.optimizer)
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
        monkeypatch.setattr(trainer.accelerator, "unscale_gradients", unscale)
        trainer.optimizer = AcceleratedOptimizer(trainer.state.optimizer, scaler=scaler)
        batch = next(iter(trainer.data.batches(start=0)))
        ema = trainer.state.ema
        assert ema is not None
        overflow = trainer.trainable.parameters()[0].register_hook(lambda gradient: gradient + math.inf)
        trainer.optimizer_step(iter([batch]))
        assert (ema.num_updates, trainer.progress.step) == (0, 1)
        overflow.remove()
        trainer.optimizer_step(iter([batch]))
        assert (ema.num_updates, trainer.progress.step) == (1, 2)


def test_average_is_kept_where_the_configuration_says(run: TinyRun) -> None:
    with run.trainer() as trainer:
        for key, expected in (("cpu", "cpu"), ("accelerator", "meta")):
            config = run.config(ema_device=key)
            ema = build_ema(config, trainer.trainable, device=torch.device("meta"))
            assert ema is not None
            assert {tensor.device.type for tensor in ema.tensors().values()} == {expected}
