"""Cached latents of images.

Shapes: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from torch import Tensor

from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.contracts import Sample

_TENSOR = "latents"
# Raise it when reading, resizing or cropping gives other pixels than before.
_PIXELS_VERSION = "pixels 1"


def latents_key(sample: Sample, *, image_digest: str, vae_identity: str) -> str:
    """The cache key of an image's latents; it changes with everything that the latents depend on."""
    crop = f"{sample.resized_px} {sample.crop_top_left} {sample.target_px}"
    crop += " mirrored" if sample.is_mirrored else ""
    return content_key(_PIXELS_VERSION, image_digest, crop, vae_identity)


def latents_entries(latents: Tensor) -> list[dict[str, Tensor]]:
    """The cache entry of each image in a batch of [B, C, h, w] latents."""
    return [{_TENSOR: each} for each in latents.detach().float().cpu()]


def read_latents(store: TensorStore, key: str) -> Tensor | None:
    """The cached [C, h, w] float32 latents, on the CPU; None if there are none."""
    entry = store.get(key)
    return None if entry is None else entry.get(_TENSOR)
