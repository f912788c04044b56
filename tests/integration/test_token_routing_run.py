"""Runs with token routing: exact on resume, and off in validation."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from tests.integration.family_runs import FLUX, IMAGES

TREAD = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
KEYS: dict[str, object] = {"tread_config": TREAD, "gradient_checkpointing": True, "train_batch_size": 2}


def test_a_resumed_run_routes_the_same_tokens(tmp_path: Path) -> None:
    whole, parts = FLUX.run(tmp_path / "whole"), FLUX.run(tmp_path / "parts")
    assert whole.run(max_train_steps=4, gradient_accumulation_steps=2, **KEYS) == 0
    for steps, images in ((2, IMAGES), (4, {})):
        assert parts.run(max_train_steps=steps, gradient_accumulation_steps=2, **KEYS, **images) == 0
    first, second = (load_file(run.output_dir / ADAPTER_FILE) for run in (whole, parts))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


def test_the_denoiser_routes_in_a_training_step_and_in_no_other_call(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    with run.trainer(**KEYS) as trainer:
        transformer = trainer.accelerator.unwrap_model(trainer.denoiser)
        tokens: list[int] = []
        transformer.single_transformer_blocks[0].attn.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        batch = next(trainer.data.batches()).to(trainer.accelerator.device)
        trainer.train_step(batch)
        assert trainer.token_routing is not None
        noisy = trainer.objective.add_noise(batch)
        with trainer.trainable.rank_mask_for(noisy.timesteps):
            trainer.family.predict(trainer.denoiser, noisy, batch)
    routed, again, plain = tokens
    num_text = batch.text.prompt_embeds.shape[1]
    assert routed == again
    assert routed - num_text == (plain - num_text) // 2
