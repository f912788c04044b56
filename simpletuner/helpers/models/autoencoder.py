"""The image autoencoder, always in float32.

Shapes: B batch, C latent channels, H W pixels, h w latent height and width.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Generator, Tensor

from simpletuner.helpers.errors import DataError


class Float32Autoencoder(AutoencoderKL):  # type: ignore[misc]
    """An autoencoder that computes in float32, whatever it is given and whatever autocast says.

    A pipeline whose denoiser runs in 16 bits can share it without casting its weights back and forth, which
    would leave them rounded.
    """

    def encode(self, x: Tensor, *, return_dict: bool = True) -> AutoencoderKLOutput | tuple[object]:
        """Encode [B, 3, H, W] pixels in [-1, 1] as diffusers does, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            encoded: AutoencoderKLOutput | tuple[object] = super().encode(x.float(), return_dict=return_dict)
        return encoded

    def decode(
        self, z: Tensor, *, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode [B, C, h, w] latents as diffusers does, in float32."""
        with torch.autocast(z.device.type, enabled=False):
            decoded: DecoderOutput | tuple[Tensor] = super().decode(
                z.float(), return_dict=return_dict, generator=generator
            )
        return decoded


def encode_scaled(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode [B, 3, H, W] pixels in [-1, 1] to [B, C, h, w] float32 latents, scaled as a denoiser expects.

    The mean of the latent distribution is taken, not a sample: it is the same on every run and for every
    batch, and the spread of a sample lies far below the noise that training adds.

    Raises:
        DataError: A latent is not finite.
    """
    with torch.no_grad():
        latents: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mode()
        mean, std = vae.config.latents_mean, vae.config.latents_std
        if mean is not None and std is not None:
            latents = (latents - _per_channel(mean, latents)) / _per_channel(std, latents)
        latents = latents * vae.config.scaling_factor
    broken = [index for index, latent in enumerate(latents) if not bool(latent.isfinite().all())]
    if broken:
        raise DataError(
            f"The VAE gave values that are not finite for image {broken[0] + 1} of {len(latents)} in this "
            "batch. Look at the image, or give another VAE in pretrained_vae_model_name_or_path."
        )
    return latents


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
