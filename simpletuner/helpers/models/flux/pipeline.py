"""The bundled Flux.1 pipelines: diffusers' own, with the rank mask of each sampling step."""

from __future__ import annotations

import diffusers
from torch import Generator, Tensor

from simpletuner.helpers.adapters.pipeline import MaskedDenoising


class FluxPipeline(MaskedDenoising, diffusers.FluxPipeline):  # type: ignore[misc]
    """Flux.1 from text to image."""

    denoiser_name = "transformer"


class _KeepsDtypeOfImage:
    """Mixin: latents have the dtype of their image, so a VAE in float32 suits a 16-bit transformer."""

    def _encode_vae_image(self, image: Tensor, generator: Generator) -> Tensor:
        """[B, 3, H, W] pixels to scaled [B, 16, H/8, W/8] latents."""
        latents: Tensor = super()._encode_vae_image(image, generator)  # type: ignore[misc]
        return latents.to(image.dtype)


class FluxImg2ImgPipeline(_KeepsDtypeOfImage, MaskedDenoising, diffusers.FluxImg2ImgPipeline):  # type: ignore[misc]
    """Flux.1 from image and text to image."""

    denoiser_name = "transformer"


class FluxInpaintPipeline(_KeepsDtypeOfImage, MaskedDenoising, diffusers.FluxInpaintPipeline):  # type: ignore[misc]
    """Flux.1 that repaints the masked part of an image."""

    denoiser_name = "transformer"


class FluxFillPipeline(MaskedDenoising, diffusers.FluxFillPipeline):  # type: ignore[misc]
    """Flux.1 Fill, trained to repaint."""

    denoiser_name = "transformer"


class FluxKontextPipeline(MaskedDenoising, diffusers.FluxKontextPipeline):  # type: ignore[misc]
    """Flux.1 Kontext, which edits an image by instruction."""

    denoiser_name = "transformer"


class FluxKontextInpaintPipeline(MaskedDenoising, diffusers.FluxKontextInpaintPipeline):  # type: ignore[misc]
    """Flux.1 Kontext that edits the masked part of an image."""

    denoiser_name = "transformer"


class FluxControlPipeline(MaskedDenoising, diffusers.FluxControlPipeline):  # type: ignore[misc]
    """Flux.1 Canny and Depth, with a control image in further channels."""

    denoiser_name = "transformer"


class FluxControlImg2ImgPipeline(MaskedDenoising, diffusers.FluxControlImg2ImgPipeline):  # type: ignore[misc]
    """Flux.1 Canny and Depth that start from an image."""

    denoiser_name = "transformer"


class FluxControlInpaintPipeline(MaskedDenoising, diffusers.FluxControlInpaintPipeline):  # type: ignore[misc]
    """Flux.1 Canny and Depth that repaint the masked part of an image."""

    denoiser_name = "transformer"


class FluxControlNetPipeline(MaskedDenoising, diffusers.FluxControlNetPipeline):  # type: ignore[misc]
    """Flux.1 with a ControlNet."""

    denoiser_name = "transformer"


class FluxControlNetImg2ImgPipeline(MaskedDenoising, diffusers.FluxControlNetImg2ImgPipeline):  # type: ignore[misc]
    """Flux.1 with a ControlNet, from image and text to image."""

    denoiser_name = "transformer"


class FluxControlNetInpaintPipeline(MaskedDenoising, diffusers.FluxControlNetInpaintPipeline):  # type: ignore[misc]
    """Flux.1 with a ControlNet that repaints the masked part of an image."""

    denoiser_name = "transformer"
