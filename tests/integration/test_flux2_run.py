"""Runs on the tiny Flux.2 models: what only this family does, and its exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from simpletuner.helpers.adapters.files.export import ExportOptions, export_adapter
from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline
from simpletuner.helpers.training.trainer import Trainer
from tests.integration.family_runs import DEV, KLEIN, FamilyModel
from tests.integration.tiny_runs import TLORA

SMALL = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4}
LOKR = {"algo": "lokr", "factor": 4, **SMALL}


@pytest.mark.parametrize(
    ("targets", "num_layers"),
    [
        (["Attention", "FeedForward"], KLEIN.num_layers),
        ([], KLEIN.num_layers),
        (["Attention"], 2 * 8 + 2 * 2),
        (["FeedForward"], 2 * 4),
        (["Flux2ParallelSelfAttention"], 2 * 2),
    ],
)
def test_generic_names_mean_flux2s_own_layers(tmp_path: Path, targets: list[str], num_layers: int) -> None:
    run = KLEIN.run(tmp_path, lycoris=TLORA | {"apply_preset": {"target_module": targets}})
    with run.trainer() as trainer:
        assert trainer.trainable.num_layers == num_layers


@pytest.mark.parametrize("model", [KLEIN, DEV], ids=["klein", "dev"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_step_opens_the_ranks_of_the_noise_level_that_the_transformer_gets(
    tmp_path: Path, model: FamilyModel, precision: str
) -> None:
    run, opened, given = model.run(tmp_path), [], []
    keys = {"gradient_checkpointing": True, "mixed_precision": precision, "train_batch_size": 3}
    with run.trainer(**keys) as trainer:
        batch = next(trainer.data.batches()).to(trainer.accelerator.device)
        noisy = trainer.family.add_noise(batch.latents, sample_indices=batch.sample_indices, seed=7)
        transformer = trainer.accelerator.unwrap_model(trainer.denoiser)

        def note(_: object, __: object, called: dict[str, Any]) -> None:
            current = mask.current_mask(trainer.trainable.group, 8)
            assert current is not None
            opened.extend(current.sum(dim=1).int().tolist())
            given.append(called["timestep"])

        transformer.register_forward_pre_hook(note, with_kwargs=True)
        stats = trainer.train_step(batch)
        assert all(parameter.grad is not None for parameter in trainer.trainable.parameters())
    assert stats.timesteps == noisy.timesteps
    assert opened == [int((1000 - timestep) / 1000 * 6) + 2 for timestep in noisy.timesteps]
    assert len(set(opened)) > 1
    assert noisy.sigmas is not None
    torch.testing.assert_close(given[0].float(), torch.tensor(noisy.sigmas), rtol=0.01, atol=0)


def test_lokr_trains_and_its_file_is_taken_up_again(tmp_path: Path) -> None:
    run = KLEIN.run(tmp_path, lycoris=LOKR | {"apply_preset": {"target_module": ["Attention"]}})
    assert run.run(max_train_steps=2) == 0
    pipeline = load()
    load_into_pipeline(pipeline, run.output_dir / ADAPTER_FILE)
    assert np.abs(sample(pipeline) - sample(load())).max() > 1e-4


def test_standard_lora_is_loaded_by_stock_diffusers(tmp_path: Path) -> None:
    run = KLEIN.run(tmp_path)
    keys = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 8, "learning_rate": 0.05}
    assert run.run(max_train_steps=2, lr_scheduler="constant", **keys) == 0
    stock = load(diffusers.Flux2KleinPipeline)
    stock.load_lora_weights(str(run.output_dir), weight_name=ADAPTER_FILE)
    # Every attention layer of both kinds of blocks.
    assert sum(isinstance(each, LoraLayer) for each in stock.transformer.modules()) == 2 * 8 + 2 * 2
    assert np.abs(sample(stock) - sample(load())).max() > 1e-4


def load(kind: Any = Flux2KleinPipeline) -> Any:
    pipeline = kind.from_pretrained(KLEIN.folder())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any) -> np.ndarray:
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 48}
    generator = torch.Generator().manual_seed(0)
    image: np.ndarray = pipeline(prompt="a cat", generator=generator, output_type="np", **call).images[0]
    return image


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_an_exported_tlora_is_loaded_whole_by_stock_diffusers(tmp_path: Path, layout: Any) -> None:
    run = KLEIN.run(tmp_path)
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
        for parameter in trainer.trainable.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
