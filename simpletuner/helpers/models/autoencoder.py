"""The image autoencoder, always in float32.

Shapes: B batch, C latent channels, H W pixels, h w latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Generator, Tensor

from simpletuner.helpers.errors import DataError
from simpletuner.helpers.models.loading import Component, Loadable, load_weights

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import PrecisionConfig

Autoencoder = TypeVar("Autoencoder", bound="ComputesInFloat32")


class ComputesInFloat32:
    """Mixin before an autoencoder: it computes in float32, whatever it is given and whatever autocast says.

    A pipeline whose denoiser runs in 16 bits can share it without casting its weights back and forth, which
    would leave them rounded.
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
    """The autoencoder of most models, in float32."""


def vae_identity(component: Component, *, precision: PrecisionConfig) -> str:
    """Changes with an autoencoder's configuration, its weights and how it is run."""
    return f"{component.identity()} float32 mean{' tiled' if precision.vae_enable_tiling else ''}"


def load_autoencoder(
    kind: type[Autoencoder], component: Component, *, precision: PrecisionConfig
) -> Autoencoder:
    """An autoencoder, frozen, in float32, with the memory savers that are wanted.

    Raises:
        ModelError: The weights are missing, damaged or of another architecture.
    """
    vae: Any = load_weights(cast(Loadable, kind), component, dtype=torch.float32)
    # It is in float32 for good; a pipeline that upcasts it would cast it back to 16 bits afterwards.
    vae.register_to_config(force_upcast=False)
    if precision.vae_enable_tiling:
        vae.enable_tiling()
    if precision.vae_enable_slicing:
        vae.enable_slicing()
    loaded: Autoencoder = vae.requires_grad_(False)
    return loaded


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
        latents = (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    check_finite(latents)
    return latents


def check_finite(latents: Tensor) -> None:
    """Refuse [B, ...] latents that are not all finite.

    Raises:
        DataError: One is not; the message says which.
    """
    broken = [index for index, latent in enumerate(latents) if not bool(latent.isfinite().all())]
    if broken:
        raise DataError(
            f"The VAE gave values that are not finite for image {broken[0] + 1} of {len(latents)} in this "
            "batch. Look at the image, or give another VAE in pretrained_vae_model_name_or_path."
        )


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]
