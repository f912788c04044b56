"""Depth estimation by a model of transformers in a folder.

Shapes: H W image height and width.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from PIL import Image

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.models.single_file import hash_file

if TYPE_CHECKING:
    import numpy.typing as npt

_FILES = ("*.json", "*.safetensors")


class DepthModels:
    """Estimates depth on the CPU; the last model stays in memory until it is unloaded."""

    def identity(self, folder: Path) -> str:
        """Text that changes with the model's files; part of the cache key of latents."""
        return _identity(folder)

    def estimate(self, image: Image.Image, folder: Path) -> Image.Image:
        """The depth of an RGB image as a grey RGB image: the model's least value black, its largest white.

        Raises:
            ModelError: The folder holds no model for depth estimation.
        """
        processor, model = _loaded(folder)
        with torch.inference_mode():
            output = model(**processor(images=image, return_tensors="pt"))
        sizes = [(image.height, image.width)]
        found = processor.post_process_depth_estimation(output, target_sizes=sizes)[0]
        return grey(found["predicted_depth"].float().numpy())

    def unload(self) -> None:
        """Free the model."""
        _loaded.cache_clear()


def grey(depth: npt.NDArray[np.float32]) -> Image.Image:
    """[H, W] numbers as a grey RGB image, stretched from black to white; black if all are equal."""
    spread = float(depth.max() - depth.min())
    share = (depth - depth.min()) / spread if spread else np.zeros_like(depth)
    return Image.fromarray(np.round(share * 255).astype(np.uint8)).convert("RGB")


@cache
def _identity(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for file in sorted(each for pattern in _FILES for each in folder.glob(pattern)):
        digest.update(f"{file.name}\x1f{file.stat().st_size}\x1f".encode())
        hash_file(file, digest)
    return f"depth={digest.hexdigest()}"


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any]:
    """Image processor and model."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor_class: Any = AutoImageProcessor
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        model = AutoModelForDepthEstimation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{printable(str(folder))}: no model for depth estimation can be loaded from it: "
            f"{printable(str(error))}. Name a folder with config.json, preprocessor_config.json and "
            ".safetensors weights."
        ) from error
    return processor, model.eval()
