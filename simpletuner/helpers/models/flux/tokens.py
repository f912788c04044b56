"""Flux.1's image tokens: one per 2 x 2 patch of the latents, with the position that the transformer turns by.

Shapes: B batch, C latent channels, h w latent height and width, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2
"""Latent positions along the edge of a token."""


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, hw/4, 4C]: one token per 2 x 2 patch."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, *, height: int) -> Tensor:
    """[B, N, 4C] -> [B, C, h, w] with `height` rows of tokens."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=PATCH, q=PATCH)


def image_ids(height: int, width: int, *, device: torch.device, number: int = 0) -> Tensor:
    """[N, 3] float32: number of the image, row and column of each of its tokens."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    numbers = torch.full_like(rows, number)
    return torch.stack([numbers, rows, columns], dim=-1).reshape(-1, 3).float().to(device)


def pack_images(images: Sequence[Tensor]) -> Tensor:
    """The tokens of several images, each [B, C, h, w] of its own size, one after the other."""
    return torch.cat([pack(each) for each in images], dim=1)


def ids_of_images(images: Sequence[Tensor], *, device: torch.device, first: int = 0) -> Tensor:
    """The positions of these tokens; the images are numbered from `first`.

    Number 0 is the noisy image, 1 and above are its references: tokens of equal row and column stay apart.

    Source: FLUX.1 Kontext, arXiv:2506.15742, section 3.2.
    """
    sizes = [(each.shape[-2] // PATCH, each.shape[-1] // PATCH) for each in images]
    return torch.cat(
        [image_ids(*size, device=device, number=number) for number, size in enumerate(sizes, start=first)]
    )
