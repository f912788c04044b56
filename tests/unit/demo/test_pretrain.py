"""Training of the embedded model, for a few steps: data, resume and output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from simpletuner.demo.curriculum import vocabulary
from simpletuner.demo.evaluate import Sampling
from simpletuner.demo.pretrain import (
    DenoisingLoss,
    Evaluation,
    Plan,
    encode_images,
    make_examples,
    pretrain,
    to_pixels,
)
from simpletuner.helpers.models.sdxl.embedded import EmbeddedModel, make_embedded

PLAN = Plan(vae_steps=1, vae_batch=2, steps=2, batch=4, num_pictures=6)
EVALUATION = Evaluation(interval=2, sampling=Sampling(prompts=2, steps=1))
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model() -> EmbeddedModel:
    return make_embedded(vocabulary(), seed=0)


@pytest.fixture(scope="module")
def denoising(model: EmbeddedModel) -> DenoisingLoss:
    examples = make_examples(PLAN)
    latents = encode_images(model, [example.image for example in examples])
    return DenoisingLoss(model, plan=Plan(batch=400), examples=examples, latents=latents)


def run(folder: Path, plan: Plan) -> Path:
    pretrain(
        folder / "model", work=folder / "work", plan=plan, device=torch.device("cpu"), evaluation=EVALUATION
    )
    return folder / "model"


def test_run_writes_model_and_record_and_resumes_from_its_own_files(tmp_path: Path) -> None:
    output = run(tmp_path, PLAN)
    weights = load_file(output / WEIGHTS)
    record = json.loads((output / "training.json").read_text())
    assert record["steps_done"] == 2
    assert record["plan"]["vae_steps"] == 1
    assert set(record["held_out_prompts_right"]) == {"background", "pattern", "place", "shape", "colour"}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    autoencoder = (tmp_path / "work" / "autoencoder.pt").stat().st_mtime_ns
    longer = run(tmp_path, Plan(vae_steps=1, vae_batch=2, steps=3, batch=4, num_pictures=6))
    assert json.loads((longer / "training.json").read_text())["steps_done"] == 3
    assert (tmp_path / "work" / "autoencoder.pt").stat().st_mtime_ns == autoencoder
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in load_file(longer / WEIGHTS).items())


def test_pixels_span_minus_one_to_one() -> None:
    image = np.zeros((2, 2, 3), dtype=np.uint8)
    image[0, 1] = (255, 0, 51)
    pixels = to_pixels([image])
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels[0, :, 0, 1].tolist() == pytest.approx([1, -1, -0.6])


def test_loss_of_a_step_depends_on_its_number_alone(model: EmbeddedModel, denoising: DenoisingLoss) -> None:
    small = DenoisingLoss(model, plan=PLAN, examples=denoising.examples, latents=denoising.latents)
    with torch.no_grad():
        assert small.loss_fn(3) == small.loss_fn(3)
        assert small.loss_fn(3) != small.loss_fn(4)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.3), (0.2, 0.44), (1.0, 1.0)])
def test_noisy_timesteps_are_drawn_more_often(
    denoising: DenoisingLoss, share: float, expected: float
) -> None:
    timesteps = denoising._draw_timesteps(np.random.default_rng(0), share=share)
    assert int(timesteps.min()) >= (700 if share == 1 else 0)
    assert 990 < int(timesteps.max()) < 1000
    assert float((timesteps >= 700).float().mean()) == pytest.approx(expected, abs=0.07)


def test_a_tenth_of_the_captions_is_zeroed(denoising: DenoisingLoss) -> None:
    text = denoising._encode([denoising.examples[0]] * 400, np.random.default_rng(0))
    assert text.pooled is not None
    dropped = (text.prompt_embeds == 0).all(dim=(1, 2))
    assert torch.equal(dropped, (text.pooled == 0).all(dim=1))
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.05)


def test_most_size_conditions_are_64_px_and_uncropped(denoising: DenoisingLoss) -> None:
    sizes = denoising._draw_sizes(np.random.default_rng(0))
    usual = (sizes == torch.tensor([64.0, 64, 0, 0, 64, 64])).all(dim=1)
    assert float(usual.float().mean()) == pytest.approx(0.85, abs=0.06)
    assert (sizes[:, 4:] == 64).all()
