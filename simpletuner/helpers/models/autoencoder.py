"""The VAE, always in float32.

Shapes: B batch, C latent channels, H W pixels, h w latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Generator, Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.models.loading import Component, load_weights

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import PrecisionConfig


class ComputesInFloat32:
    """Mixin for an autoencoder: it computes in float32, whatever the input dtype and autocast.

    A pipeline with a 16-bit denoiser can share it; casting the weights to 16 bits and back would round them.
    """

    def encode(self, x: Tensor, *, return_dict: bool = True) -> AutoencoderKLOutput | tuple[object]:
        """Encode [B, 3, H, W] pixels in [-1, 1] as diffusers does, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            encoded: AutoencoderKLOutput | tuple[object] = super().encode(  # type: ignore[misc]
                x.float(), return_dict=return_dict
            )
        return encoded

    def decode(
        self, z: Tensor, *, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode [B, C, h, w] latents as diffusers does, in float32."""
        with torch.autocast(z.device.type, enabled=False):
            decoded: DecoderOutput | tuple[Tensor] = super().decode(  # type: ignore[misc]
                z.float(), return_dict=return_dict, generator=generator
            )
        return decoded


class Float32Autoencoder(ComputesInFloat32, AutoencoderKL):  # type: ignore[misc]
    """AutoencoderKL in float32."""


def load_autoencoder(
    vae_class: type[ComputesInFloat32],
    component: Component,
    *,
    precision: PrecisionConfig,
    device: torch.device,
) -> Any:
    """Load a VAE, frozen, in float32, with the memory savers of the configuration.

    Raises:
        ModelError: The weights are missing, damaged or of another architecture.
    """
    any_class: type[Any] = vae_class
    vae = load_weights(any_class, component, dtype=torch.float32)
    # With force_upcast, a pipeline would cast the VAE to 16 bits after decoding.
    vae.register_to_config(force_upcast=False)
    if precision.vae_enable_tiling:
        vae.enable_tiling()
    if precision.vae_enable_slicing:
        vae.enable_slicing()
    return vae.requires_grad_(False).to(device)


def encode_scaled(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode [B, 3, H, W] pixels in [-1, 1] to [B, C, h, w] float32 latents, scaled as a denoiser expects.

    The latents are the mean of the distribution, not a sample: equal on every run and in every batch, and the
    spread of a sample is far below the noise that training adds.

    Raises:
        DataError: A latent is not finite.
    """
    with torch.no_grad():
        latents: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mode()
        mean, std = vae.config.latents_mean, vae.config.latents_std
        if mean is not None and std is not None:
            latents = (latents - _per_channel(mean, latents)) / _per_channel(std, latents)
        latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    check_finite(latents)
    return latents


def check_finite(latents: Tensor) -> None:
    """Refuse [B, ...] latents that are not finite.

    Raises:
        DataError: A latent is not finite; the message has its index.
    """
    broken = [index for index, latent in enumerate(latents) if not bool(latent.isfinite().all())]
    if broken:
        raise DataError(
            f"The latents of image {broken[0] + 1} of {len(latents)} in this batch are not finite. "
            "Check the image, or set another VAE in pretrained_vae_model_name_or_path."
        )


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
