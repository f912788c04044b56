"""The float32 autoencoder."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.models.autoencoder import Float32Autoencoder, encode_scaled
from simpletuner.helpers.models.sdxl.tiny import make_vae
from simpletuner.helpers.models.tiny_parts import fill_weights


@pytest.fixture
def vae() -> Float32Autoencoder:
    stock = make_vae()
    fill_weights(stock, seed=3)
    own: Float32Autoencoder = Float32Autoencoder.from_config(stock.config)
    own.load_state_dict(stock.state_dict())
    return own.eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode_scaled_is_the_mean_times_the_scaling_factor(
    vae: Float32Autoencoder, pixels: torch.Tensor
) -> None:
    latents = encode_scaled(vae, pixels)
    assert latents.shape == (3, 4, 8, 4)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        expected = AutoencoderKL.encode(vae, pixels).latent_dist.mean * 0.13025
    assert torch.equal(latents, expected)


def test_encode_scaled_repeats_itself_and_does_not_depend_on_the_batch(
    vae: Float32Autoencoder, pixels: torch.Tensor
) -> None:
    latents = encode_scaled(vae, pixels)
    assert torch.equal(latents, encode_scaled(vae, pixels))
    alone = torch.cat([encode_scaled(vae, pixels[index : index + 1]) for index in range(3)])
    torch.testing.assert_close(alone, latents, rtol=1e-5, atol=1e-6)


def test_encode_scaled_normalises_channels_when_the_model_says_how(
    vae: Float32Autoencoder, pixels: torch.Tensor
) -> None:
    plain = encode_scaled(vae, pixels) / 0.13025
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 2.0, 4.0, 4.0])
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    std = torch.tensor([2.0, 2.0, 4.0, 4.0])[:, None, None]
    torch.testing.assert_close(encode_scaled(vae, pixels), (plain - mean) / std * 0.13025)


def test_autoencoder_stays_in_float32_for_16_bit_input_and_under_autocast(
    vae: Float32Autoencoder, pixels: torch.Tensor
) -> None:
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        expected = vae.decode(latents).sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vae.encode(pixels).latent_dist.mean, latents)
            assert torch.equal(vae.decode(latents).sample, expected)
        decoded = vae.decode(latents.bfloat16()).sample
    assert decoded.dtype == torch.float32
    assert vae.dtype == torch.float32


def test_encode_scaled_refuses_what_is_not_finite_and_says_which_image(
    vae: Float32Autoencoder, pixels: torch.Tensor
) -> None:
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="image 2 of 3"):
        encode_scaled(vae, pixels)
