"""The bundled SDXL pipelines: diffusers' own, with the rank mask of each sampling step."""

from __future__ import annotations

import diffusers

from simpletuner.helpers.adapters.pipeline import MaskedDenoising


class StableDiffusionXLPipeline(MaskedDenoising, diffusers.StableDiffusionXLPipeline):  # type: ignore[misc]
    """SDXL from text to image."""

    denoiser_name = "unet"


class StableDiffusionXLImg2ImgPipeline(MaskedDenoising, diffusers.StableDiffusionXLImg2ImgPipeline):  # type: ignore[misc]
    """SDXL from image and text to image."""

    denoiser_name = "unet"


class StableDiffusionXLInpaintPipeline(MaskedDenoising, diffusers.StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
    """SDXL that repaints the masked part of an image."""

    denoiser_name = "unet"
