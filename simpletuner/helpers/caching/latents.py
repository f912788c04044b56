"""Cached latents of images.

Shapes: B batch, C latent channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from simpletuner.helpers.caching.memory import EntryStore
from simpletuner.helpers.caching.store import content_key, key_part
from simpletuner.helpers.contracts import Sample, Size

_TENSOR = "latents"
# Raise it when reading, resizing or cropping gives other pixels than before.
_PIXELS_VERSION = "pixels 1"
_MOST_CUTS = 10_000  # remembered while keys are made


def latents_key(sample: Sample, *, image_digest: str, vae_identity: str) -> str:
    """The cache key of an image's latents; it changes with everything that the latents depend on."""
    crop = f"{sample.resized_px} {sample.crop_top_left} {sample.target_px}"
    crop += " mirrored" if sample.is_mirrored else ""
    return content_key(_PIXELS_VERSION, image_digest, crop, vae_identity)


def latents_key_texts(
    contents: Iterable[str], cuts: Iterable[tuple[int, ...]], *, vae_identity: str
) -> Iterator[bytes]:
    """The bytes whose hash is the cache key of each of many images' latents, as `latents_key` makes it.

    Args:
        contents: Identity of the pixels of each image.
        cuts: Height and width of the resized size, top and left, height and width of the crop of each.
        vae_identity: Of the VAE.
    """
    first, last = key_part(_PIXELS_VERSION), key_part(vae_identity)
    parts: dict[tuple[int, ...], bytes] = {}
    for content, cut in zip(contents, cuts, strict=True):
        part = parts.get(cut)
        if part is None:
            height, width, top, left, target_height, target_width = cut
            crop = f"{Size(height, width)} {(top, left)} {Size(target_height, target_width)}"
            part = key_part(crop) + last
            if len(parts) < _MOST_CUTS:
                parts[cut] = part
        yield b"%b%d:%b%b" % (first, len(content), content.encode(), part)


def latents_entries(latents: Tensor) -> list[dict[str, Tensor]]:
    """The cache entry of each image in a batch of [B, C, h, w] latents."""
    return [{_TENSOR: each} for each in latents.detach().float().cpu()]


def read_latents(store: EntryStore, key: str) -> Tensor | None:
    """The cached [C, h, w] float32 latents, on the CPU; None if there are none."""
    entry = store.get(key)
    return None if entry is None else entry.get(_TENSOR)
