"""Memory of text encoders and VAEs, by their published sizes. Imports no torch.

Shapes: B batch, L text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.precisions import Precision

FLOAT32 = 4
VAE_WEIGHTS = 84_000_000
"""Weights of the VAEs here, which differ in their latents' channels alone: 83.7 to 84.0 million."""
ENCODE_NUMBERS, DECODE_NUMBERS = 640, 768
"""Numbers of activations that exist at once for each pixel of an image: five maps of 128 channels, three of
256. A VAE computes in float32."""
VAE_TILE_PX = 1024 * 1024
"""Pixels of a tile with vae_enable_tiling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoder:
    """Size of a text encoder."""

    num_weights: int
    kept_weights: int
    """Of those, embeddings and what else stays in 16 bits in a quantised encoder."""
    layers: int
    width: int
    hidden: int
    """Of its feed-forward layers."""
    heads: int
    tokens: int
    """Of a prompt."""
    vocabulary: int = 0
    """Numbers that it predicts for each token; 0 for one without a head."""

    def weight_bytes(self, precision: Precision, *, unquantised: int) -> int:
        """Bytes of its weights.

        Args:
            precision: Format of its linear layers.
            unquantised: Bytes of a weight in all others.
        """
        per_weight = unquantised if precision.bytes_per_weight is None else precision.bytes_per_weight
        quantised = self.num_weights - self.kept_weights
        return round(quantised * per_weight + self.kept_weights * unquantised)

    def working_bytes(self, batch_size: int, *, bytes_per_number: int) -> int:
        """About what encoding takes beside the weights: every layer's output, scores, and wide tensors."""
        scores = 5 * self.heads * self.tokens
        numbers = (self.layers + 1) * self.width + scores + 6 * self.hidden + self.vocabulary
        return batch_size * self.tokens * numbers * bytes_per_number


def vae_working_bytes(pixels: int, *, decodes: bool, tiles: bool) -> int:
    """Bytes of the activations that encoding or decoding images of so many pixels takes at once."""
    numbers = DECODE_NUMBERS if decodes else ENCODE_NUMBERS
    return FLOAT32 * numbers * (min(pixels, VAE_TILE_PX) if tiles else pixels)


CLIP_L = TextEncoder(
    num_weights=123_060_480,
    kept_weights=38_004_480,
    layers=12,
    width=768,
    hidden=3072,
    heads=12,
    tokens=77,
)
"""CLIP ViT-L/14, which two families have."""
