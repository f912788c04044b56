"""The bundled Flux.2 pipelines: diffusers' own, with the rank mask of each sampling step."""

from __future__ import annotations

import diffusers

from simpletuner.helpers.adapters.pipeline import MaskedDenoising


class Flux2Pipeline(MaskedDenoising, diffusers.Flux2Pipeline):  # type: ignore[misc]
    """Flux.2 dev from text, and reference images if given, to image."""

    denoiser_name = "transformer"


class Flux2KleinPipeline(MaskedDenoising, diffusers.Flux2KleinPipeline):  # type: ignore[misc]
    """Flux.2 Klein from text, and reference images if given, to image."""

    denoiser_name = "transformer"


class Flux2KleinInpaintPipeline(MaskedDenoising, diffusers.Flux2KleinInpaintPipeline):  # type: ignore[misc]
    """Flux.2 Klein that repaints the masked part of an image."""

    denoiser_name = "transformer"


class Flux2KleinKVPipeline(MaskedDenoising, diffusers.Flux2KleinKVPipeline):  # type: ignore[misc]
    """Flux.2 Klein that computes the keys and values of reference images in the first step only."""

    denoiser_name = "transformer"
