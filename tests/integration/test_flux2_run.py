"""Runs on the tiny Flux.2 models: cache, train, checkpoint, validate, resume, sample, export."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.training.trainer import Trainer, to_device
from tests.integration.attached import command
from tests.integration.tiny_runs import TLORA, TinyRun

THREE_CLASSES = ["Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention"]
"""As users of other trainers write them."""
NUM_LAYERS = 2 * (8 + 2 + 2) + 2 * 2
"""A double block has 8 projections of attention and two feed-forward layers on each side, a single one 2."""
SMALL = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4}
LOKR = {"algo": "lokr", "factor": 4, **SMALL}
PICTURES = {
    "validation_disable": False,
    "validation_prompt": "a photo of a cat",
    "validation_resolution": "64x80",
    "validation_num_inference_steps": 3,
    "validation_step_interval": 2,
    "validation_seed": 5,
}


@functools.cache
def model(kind: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_flux2_{kind}_"))
    save_tiny_flux2(folder, klein=kind == "klein")
    return folder


def make_run(folder: Path, kind: str = "klein", lycoris: dict[str, object] | None = None) -> TinyRun:
    keys = {"model_family": "flux2", "pretrained_model_name_or_path": str(model(kind))}
    targets = {"apply_preset": {"target_module": THREE_CLASSES}}
    return TinyRun(folder, lycoris=TLORA | targets if lycoris is None else lycoris, keys=keys)


def paths_of(file: Path) -> set[str]:
    return {key.split(".")[0] for key in load_file(file)}


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_a_run_ends_with_everything_it_promises(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, kind)
    assert run.run(learning_rate=0.05, lr_scheduler="constant", **PICTURES) == 0
    for name in (ADAPTER_FILE, f"checkpoint-4/{ADAPTER_FILE}", "validation/step-2/grid.png"):
        assert (run.output_dir / name).is_file(), name
    file = run.output_dir / ADAPTER_FILE
    assert len(paths_of(file)) == NUM_LAYERS
    assert [line["step"] for line in run.log()] == [1, 2, 3, 4]
    assert all(2 <= line["mean_active_rank"] <= 8 for line in run.log())
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["model_family"] == "flux2"
    assert json.loads(metadata["tlora_config"])["max_rank"] == 8
    base, trained = (picture_of(run.output_dir / "validation" / each) for each in ("base", "step-4"))
    assert np.abs(base - trained).max() > 2
    # What the last validation showed is what the finished file gives to whoever samples from it.
    arguments = ("--prompt", PICTURES["validation_prompt"], "--size", "64x80", "--steps", 3, "--seed", 5)
    output = tmp_path / "sampled"
    assert command(monkeypatch, "sample", "--adapter", file, *arguments, "--output", output) == 0
    assert np.abs(picture_of(output) - trained).max() <= 1


def picture_of(folder: Path) -> np.ndarray:
    (file,) = (each for each in folder.glob("*.png") if each.name != "grid.png")
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("targets", "num_layers"),
    [
        (["Attention", "FeedForward"], NUM_LAYERS),
        ([], NUM_LAYERS),
        (["Attention"], 2 * 8 + 2 * 2),
        (["FeedForward"], 2 * 4),
        (["Flux2ParallelSelfAttention"], 2 * 2),
    ],
)
def test_generic_names_mean_flux2s_own_layers(tmp_path: Path, targets: list[str], num_layers: int) -> None:
    run = make_run(tmp_path, lycoris=TLORA | {"apply_preset": {"target_module": targets}})
    with run.trainer() as trainer:
        assert trainer.adapter.num_layers == num_layers


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, interrupted = make_run(tmp_path / "whole"), make_run(tmp_path / "interrupted")
    keys = {"lr_scheduler": "constant", "train_batch_size": 2}
    assert whole.run(max_train_steps=3, **keys) == 0
    for steps in (1, 3):
        assert interrupted.run(max_train_steps=steps, **keys) == 0
    ours, theirs = (load_file(run.output_dir / ADAPTER_FILE) for run in (interrupted, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert interrupted.log() == whole.log()


@pytest.mark.parametrize("kind", ["klein", "dev"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_step_opens_the_ranks_of_the_noise_level_that_the_transformer_gets(
    tmp_path: Path, kind: str, precision: str
) -> None:
    run, opened, given = make_run(tmp_path, kind), [], []
    keys = {"gradient_checkpointing": True, "mixed_precision": precision, "train_batch_size": 3}
    with run.trainer(**keys) as trainer:
        batch = to_device(next(trainer.data.batches()), trainer.accelerator.device)
        noised = trainer.family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=7)
        transformer = trainer.accelerator.unwrap_model(trainer.denoiser)

        def note(_: object, __: object, called: dict[str, Any]) -> None:
            current = mask.current_mask(trainer.adapter.group, 8)
            assert current is not None
            opened.extend(current.sum(dim=1).int().tolist())
            given.append(called["timestep"])

        transformer.register_forward_pre_hook(note, with_kwargs=True)
        stats = trainer.train_step(batch)
        assert all(parameter.grad is not None for parameter in trainer.adapter.parameters())
    assert stats.timesteps == noised.timesteps
    assert opened == [int((1000 - timestep) / 1000 * 6) + 2 for timestep in noised.timesteps]
    assert len(set(opened)) > 1
    assert noised.sigmas is not None
    torch.testing.assert_close(given[0].float(), torch.tensor(noised.sigmas), rtol=0.01, atol=0)


def test_lokr_trains_and_its_file_is_taken_up_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, lycoris=LOKR | {"apply_preset": {"target_module": ["Attention"]}})
    assert run.run(max_train_steps=2) == 0
    pipeline = load()
    load_into_pipeline(pipeline, run.output_dir / ADAPTER_FILE)
    assert np.abs(sample(pipeline) - sample(load())).max() > 1e-4


def test_standard_lora_is_loaded_by_stock_diffusers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    keys = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 0.05}
    assert run.run(max_train_steps=2, lr_scheduler="constant", **keys) == 0
    stock = load(diffusers.Flux2KleinPipeline)
    stock.load_lora_weights(str(run.output_dir), weight_name=ADAPTER_FILE)
    # Every attention layer of both kinds of blocks.
    assert sum(isinstance(each, LoraLayer) for each in stock.transformer.modules()) == 2 * 8 + 2 * 2
    assert np.abs(sample(stock) - sample(load())).max() > 1e-4


def load(kind: Any = Flux2KleinPipeline) -> Any:
    pipeline = kind.from_pretrained(model("klein"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any) -> np.ndarray:
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 48}
    generator = torch.Generator().manual_seed(0)
    image: np.ndarray = pipeline(prompt="a cat", generator=generator, output_type="np", **call).images[0]
    return image


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_an_exported_tlora_is_loaded_whole_by_stock_diffusers(tmp_path: Path, layout: Any) -> None:
    run = make_run(tmp_path)
    with run.trainer() as trainer:
        give_effect(trainer)
        trainer.save_checkpoint()
    file = run.output_dir / "checkpoint-0" / ADAPTER_FILE
    options = ExportOptions(layout=layout, rank=5)
    (exported,) = export_adapter(file, tmp_path / "plain.safetensors", options, families=registry.specs())
    stock, bundled = load(diffusers.Flux2KleinPipeline), load()
    stock.load_lora_weights(str(exported.file.parent), weight_name=exported.file.name)
    adapter = load_into_pipeline(bundled, file)
    bundled._tlora_config = None
    # At t = 500 of 1000 the schedule from 2 to 8 opens 5 ranks.
    with mask.rank_mask(adapter.schedule, [500], group=adapter.group):
        live = sample(bundled)
    np.testing.assert_allclose(sample(stock), live, rtol=0, atol=2e-5)
    assert np.abs(live - sample(load())).max() > 1e-3


def give_effect(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
