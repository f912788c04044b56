"""The tiny model of each family, and runs on it."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from tests.integration.flux_pipelines import tiny_flux
from tests.integration.tiny_runs import TLORA, TinyRun, tiny_model

IMAGES: dict[str, object] = {
    "validation_disable": False,
    "validation_prompt": "a photo of a cat",
    "validation_resolution": "64x80",
    "validation_num_inference_steps": 3,
    "validation_step_interval": 2,
    "validation_seed": 5,
}


@functools.cache
def tiny_flux2(kind: str) -> Path:
    """A tiny Flux.2 of the kind dev, klein or distilled, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny_flux2_{kind}_"))
    save_tiny_flux2(folder, klein=kind != "dev", is_distilled=kind == "distilled")
    return folder


@dataclass(frozen=True)
class FamilyModel:
    """A family's tiny model and the layers that a T-LoRA adapts on it."""

    family: str
    folder: Callable[[], Path]
    targets: tuple[str, ...]
    num_layers: int

    def run(self, folder: Path, lycoris: dict[str, object] | None = None) -> TinyRun:
        """A run that is not started; a T-LoRA of rank 8 if nothing else is asked for."""
        keys = {"model_family": self.family, "pretrained_model_name_or_path": str(self.folder())}
        return TinyRun(folder, lycoris=self.tlora if lycoris is None else lycoris, keys=keys)

    @property
    def tlora(self) -> dict[str, object]:
        """The lycoris json of a T-LoRA on all of its targets."""
        return {**TLORA, "apply_preset": {"target_module": list(self.targets)}}


SDXL = FamilyModel("sdxl", tiny_model, ("Attention",), 32)
# A double block has 8 projections of attention and 4 feed-forward layers, a single one 3 and 2.
FLUX = FamilyModel("flux", tiny_flux, ("Attention", "FeedForward"), 2 * (8 + 4) + 2 * (3 + 2))
# As users of other trainers name them. A double block has 8 and 2 on each side, a single one 2.
_FLUX2 = ("Flux2Attention", "Flux2FeedForward", "Flux2ParallelSelfAttention")
KLEIN = FamilyModel("flux2", lambda: tiny_flux2("klein"), _FLUX2, 2 * (8 + 2 + 2) + 2 * 2)
DEV = FamilyModel("flux2", lambda: tiny_flux2("dev"), _FLUX2, 2 * (8 + 2 + 2) + 2 * 2)
MODELS = {"sdxl": SDXL, "flux": FLUX, "flux2-klein": KLEIN, "flux2-dev": DEV}


def image_in(folder: Path) -> np.ndarray:
    """The values of a folder's one image beside the grid, [H, W, 3]."""
    (file,) = (each for each in folder.glob("*.png") if each.name != "grid.png")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)
