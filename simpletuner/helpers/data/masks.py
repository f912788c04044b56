"""Masks of the loss: the mask of each image, read to a factor for each element of its latents.

Shapes: H W image height and width, h w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from simpletuner.helpers.configuration.schema.masks import MaskConfig
from simpletuner.helpers.contracts import Sample
from simpletuner.helpers.data.images import decode_values
from simpletuner.helpers.data.index import content_digest
from simpletuner.helpers.data.sources.base import FoundFile

if TYPE_CHECKING:
    from torch import Tensor

MaskKind = Literal["mask", "segmentation", "alpha"]

CELL_PX = 8
"""Edge of the cells in which masks are cached: that of the finest latents, so that coarser ones are means."""
BLANK = "its mask is black everywhere in the crop"
_MID_GREY = 0.5
# Raise it when reading or cropping gives other values than before.
_VERSION = "masks 1"


@dataclass(frozen=True, slots=True)
class FoundMask:
    """The file that masks an image."""

    file: FoundFile
    digest: str
    """Of the file's bytes."""
    kind: MaskKind
    problem: str | None = None
    """The reason if its pixels were found damaged in an earlier run."""


def mask_key(mask: FoundMask, sample: Sample) -> str:
    """The cache key of a sample's mask; it changes with everything that the mask depends on."""
    crop = f"{sample.resized_px} {sample.crop_top_left} {sample.target_px}"
    return content_digest(f"{_VERSION}\n{mask.digest}\n{crop}\n{mask.kind}".encode())


def read_mask(data: bytes, sample: Sample, *, kind: MaskKind) -> Tensor:
    """Read the mask of a sample: [1, H / 8, W / 8] float16 in [0, 1], the means of cells in its crop.

    Raises:
        DataError: The file is damaged; the message does not name it.
    """
    import torch  # here, because validate finds masks without torch

    return torch.from_numpy(mask_cells(data, sample, kind=kind)).to(torch.float16)[None]


def mask_cells(data: bytes, sample: Sample, *, kind: MaskKind) -> npt.NDArray[np.float64]:
    """Read the mask of a sample: [H / 8, W / 8] in [0, 1], the means of cells in its crop.

    Raises:
        DataError: The file is damaged; the message does not name it.
    """
    values = decode_values(data)
    channels = {"mask": "R", "segmentation": "RGB", "alpha": "A"}[kind]
    means = [_cells(values.getchannel(channel), sample) for channel in channels]
    cells: npt.NDArray[np.float64] = np.mean(means, axis=0) / 255
    return cells


def loss_factors(mask: Tensor, kind: MaskKind, *, grid: tuple[int, int], config: MaskConfig) -> Tensor:
    """The factor of the loss of each element, [1, h, w] float32, from a mask of `read_mask`.

    Args:
        mask: The means of its cells.
        kind: What the mask is.
        grid: h, w.
        config: Least weight, and whether the mean of the factors is 1.
    """
    import torch

    factors = torch.nn.functional.adaptive_avg_pool2d(mask.float(), grid)
    if kind == "segmentation":
        factors = (factors > _MID_GREY).float()
    factors = factors.clamp(min=config.unmasked_weight)
    if config.normalize_masked_area_loss:
        factors = factors / factors.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return factors


def is_blank(mask: Tensor | npt.NDArray[np.float64], kind: MaskKind, config: MaskConfig) -> bool:
    """Whether a mask of `read_mask` or `mask_cells` leaves nothing of its image to learn."""
    least = _MID_GREY if kind == "segmentation" else 0.0
    return config.unmasked_weight == 0 and not bool((mask > least).any())


def _cells(channel: Image.Image, sample: Sample) -> np.ndarray:
    """The means of the cells in the sample's crop, [H / 8, W / 8], of a channel of any size."""
    top, left = sample.crop_top_left
    height, width = sample.target_px.height, sample.target_px.width
    across = channel.width / sample.resized_px.width
    down = channel.height / sample.resized_px.height
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    cells = (-(-width // CELL_PX), -(-height // CELL_PX))
    resized = channel.convert("F").resize(cells, Image.Resampling.BOX, box=box)
    return np.asarray(resized, dtype=np.float64)
