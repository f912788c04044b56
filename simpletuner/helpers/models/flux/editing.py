"""The pipeline of Flux.1 Kontext for references as training has them: of any size and number.

Shapes: C latent channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simpletuner.helpers.models.flux.pipeline import FluxKontextPipeline
from simpletuner.helpers.models.flux.tokens import ids_of_images, pack_images


class FluxEditPipeline(FluxKontextPipeline):
    """Flux.1 Kontext that changes no size: the image has the size of the call, references have their own.

    diffusers' pipeline takes one reference, resizes it to a size of its list, and scales the image to a
    megapixel.
    """

    _references: Sequence[Tensor] = ()

    def __call__(
        self, *args: Any, references: Sequence[Tensor] = (), height: int, width: int, **options: Any
    ) -> Any:
        """Generate as diffusers' pipeline does.

        Args:
            args: As diffusers'.
            references: Clean latents, each [1, C, h, w]; numbered from 1 in the positions of their tokens.
            height: Of the image in pixels, as it is.
            width: The same.
            options: As diffusers'.
        """
        self._references = references
        return super().__call__(*args, height=height, width=width, max_area=height * width, **options)

    def prepare_latents(self, image: object, batch_size: int, *args: Any, **options: Any) -> tuple[Any, ...]:
        """The noise and its positions, and the tokens of the references and their positions."""
        noise, _, noise_ids, _ = super().prepare_latents(None, batch_size, *args, **options)
        if not self._references:
            return noise, None, noise_ids, None
        tokens = pack_images(self._references).to(noise.device, noise.dtype).expand(batch_size, -1, -1)
        ids = ids_of_images(self._references, device=noise_ids.device, first=1).to(noise_ids.dtype)
        return noise, tokens, noise_ids, ids
