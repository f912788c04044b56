"""The pipelines of Flux.2 for references as training has them: of any size."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from simpletuner.helpers.models.flux2.pipeline import Flux2KleinPipeline, Flux2Pipeline


class WholeReferences(Flux2ImageProcessor):  # type: ignore[misc]
    """Takes references as they are.

    diffusers' own refuses small and elongated ones and scales them down to a megapixel.
    """

    @staticmethod
    def check_image_input(image: Image.Image, *_: object, **__: object) -> Image.Image:
        """The image."""
        return image

    @staticmethod
    def _resize_to_target_area(image: Image.Image, *_: object, **__: object) -> Image.Image:
        return image


class Flux2EditPipeline(Flux2Pipeline):
    """Flux.2 dev with references of any size whose edges are multiples of 16 pixels."""

    def __init__(self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.image_processor = WholeReferences(vae_scale_factor=self.vae_scale_factor * 2)


class Flux2KleinEditPipeline(Flux2KleinPipeline):
    """Flux.2 Klein with references of any size whose edges are multiples of 16 pixels."""

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        *,
        is_distilled: bool = False,
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled=is_distilled)
        self.image_processor = WholeReferences(vae_scale_factor=self.vae_scale_factor * 2)
