"""Flux.2's latents: one token per 2 x 2 patch of the VAE's latents, normalised per channel.

Shapes: B batch, c VAE channels, C = 4c latent channels, H W pixels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from einops import rearrange
from torch import Tensor

from simpletuner.helpers.models.autoencoder import ComputesInFloat32, check_finite

PATCH = 2
"""VAE latent positions along the edge of a token."""
PIXELS_PER_TOKEN = 16**2


class Float32Flux2Autoencoder(ComputesInFloat32, AutoencoderKLFlux2):  # type: ignore[misc]
    """Flux.2's VAE in float32."""


def encode_normalised(vae: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Encode [B, 3, H, W] pixels in [-1, 1] to [B, C, h, w] float32 latents, as the transformer expects.

    The latents are the mean of the distribution, not a sample; the running statistics of the VAE's batch norm
    normalise each channel.

    Raises:
        DataError: A latent is not finite.
    """
    with torch.no_grad():
        mean: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mode()  # [B, c, 2h, 2w]
        patches = rearrange(mean, "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH)
        centre = vae.bn.running_mean[:, None, None]
        spread = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
        latents: Tensor = (patches - centre) / spread
    check_finite(latents)
    return latents


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C]."""
    return rearrange(latents, "b c h w -> b (h w) c")


def from_tokens(tokens: Tensor, *, height: int) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w] with `height` rows."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def pack_images(images: Sequence[Tensor]) -> Tensor:
    """The tokens of several images, each [B, C, h, w] of its own size, one after the other."""
    return torch.cat([to_tokens(each) for each in images], dim=1)


def ids_of_images(images: Sequence[Tensor]) -> Tensor:
    """[B, N, 4] the positions of these tokens: time, row, column and 0.

    The first image, the noisy one, has time 0; its references have 10, 20 and so on.
    """
    noisy, *references = images
    ids: Tensor = Flux2Pipeline._prepare_latent_ids(noisy)
    if not references:
        return ids
    of_references = Flux2Pipeline._prepare_image_ids([each[:1] for each in references])  # [1, R, 4]
    return torch.cat([ids, of_references.expand(len(ids), -1, -1)], dim=1)
