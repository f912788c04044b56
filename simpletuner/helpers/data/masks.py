"""Masks of the loss: the mask of each image, read to a factor for each element of its latents.

Shapes: H W image height and width, h w latent height and width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig, MaskConfig
from simpletuner.helpers.contracts import Sample, Size
from simpletuner.helpers.data.images import decode_values
from simpletuner.helpers.data.index import ImageIndex, ImageInfo, content_digest
from simpletuner.helpers.data.scan_report import listed
from simpletuner.helpers.data.sources import FoundFile, scan_folder
from simpletuner.helpers.io.names import counted, printable

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


@dataclass(slots=True)
class MaskFinder:
    """Finds the masks of a dataset's images; notes those that are missing, ambiguous or of another shape."""

    dataset: DatasetConfig
    folder: ConditioningConfig | None
    """Entry of the masks; None if the alpha channels are the masks."""
    index: ImageIndex | None
    """Of the folder."""
    _masks: dict[str, list[FoundFile]] = field(init=False, default_factory=dict)
    """Path in the folder without suffix -> the files of that name."""
    _missing: list[str] = field(init=False, default_factory=list)
    _ambiguous: list[str] = field(init=False, default_factory=list)
    _misshapen: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        files = scan_folder(self.folder.instance_data_dir).images if self.folder is not None else ()
        for file in files:
            self._masks.setdefault(os.path.splitext(file.name)[0], []).append(file)

    def mask_of(self, image: FoundFile, info: ImageInfo) -> FoundMask | str:
        """The mask of a usable image, or the reason why the image cannot be used."""
        if self.folder is None or self.index is None:
            return FoundMask(image, info.digest, "alpha")
        name = printable(image.name)
        found = self._masks.get(os.path.splitext(image.name)[0], [])
        if len(found) != 1:
            names = ", ".join(printable(each.name) for each in found)
            (self._ambiguous if found else self._missing).append(f"{name} ({names})" if found else name)
            return f"{len(found)} masks have its name"
        mask = self.index.info(found[0])
        if mask.size is None:
            return f"its mask {printable(found[0].name)} cannot be used: {mask.problem}"
        assert info.size is not None, "the image is usable"
        if not has_aspect(mask.size, info.size):
            self._misshapen.append(f"{name} ({info.size}, its mask {mask.size})")
            return "its mask has another aspect ratio"
        return FoundMask(found[0], mask.digest, self.folder.conditioning_type, mask.problem)

    def problem(self) -> str | None:
        """Why the masks so far cannot be used; None if they can."""
        if self.folder is None:
            return None
        folder = printable(str(self.folder.instance_data_dir))
        found = {
            f"no mask in {folder}. Add a file of the same path and name, but for its suffix; a white mask "
            "keeps the whole image": self._missing,
            f"several masks in {folder}. Keep one of each": self._ambiguous,
            "a mask of another aspect ratio. Make it as large as the image": self._misshapen,
        }
        lines = [
            f"{counted(len(names), 'image has', 'images have')} {text}: {listed(names)}"
            for text, names in found.items()
            if names
        ]
        return f"Dataset {self.dataset.id!r}: {'. '.join(lines)}." if lines else None


def mask_key(mask: FoundMask, sample: Sample) -> str:
    """The cache key of a sample's mask; it changes with everything that the mask depends on."""
    crop = f"{sample.resized_px} {sample.crop_top_left} {sample.target_px}"
    return content_digest(f"{_VERSION}\n{mask.digest}\n{crop}\n{mask.kind}".encode())


def has_aspect(mask_px: Size, image_px: Size) -> bool:
    """Whether one size is the other one enlarged, but for edges rounded by less than a pixel."""
    error_px2 = abs(mask_px.width * image_px.height - mask_px.height * image_px.width)
    return error_px2 < max(mask_px.width, mask_px.height, image_px.width, image_px.height)


def read_mask(data: bytes, sample: Sample, *, kind: MaskKind) -> Tensor:
    """Read the mask of a sample: [1, H / 8, W / 8] float16 in [0, 1], the means of cells in its crop.

    Raises:
        DataError: The file is damaged; the message does not name it.
    """
    values = decode_values(data)
    channels = {"mask": "R", "segmentation": "RGB", "alpha": "A"}[kind]
    means = [_cells(values.getchannel(channel), sample) for channel in channels]
    import torch  # here, because validate finds masks without torch

    return torch.from_numpy(np.mean(means, axis=0) / 255).to(torch.float16)[None]


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


def is_blank(mask: Tensor, kind: MaskKind, config: MaskConfig) -> bool:
    """Whether a mask of `read_mask` leaves nothing of its image to learn."""
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
