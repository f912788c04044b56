"""A tiny model on disk, and copies of it that a test may break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.configuration.sections import ModelConfig, NoiseConfig, PrecisionConfig
from simpletuner.helpers.models.sdxl.family import SDXL
from simpletuner.helpers.models.sdxl.tiny import save_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL that no test may change."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_sdxl(folder)
    return folder


@pytest.fixture
def copied_sdxl(tiny_sdxl: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the tiny SDXL that the test may change."""
    copies = 0

    def copy() -> Path:
        nonlocal copies
        copies += 1
        return Path(shutil.copytree(tiny_sdxl, tmp_path / f"copy-{copies}"))

    return copy


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> Callable[..., SDXL]:
    """Makes the SDXL family on the CPU; keywords change the model's configuration."""

    def make(
        folder: Path = tiny_sdxl,
        *,
        noise: NoiseConfig | None = None,
        precision: PrecisionConfig | None = None,
        weight_dtype: torch.dtype = torch.float32,
        **changes: object,
    ) -> SDXL:
        values = {"model_family": "sdxl", "pretrained_model_name_or_path": str(folder), **changes}
        return SDXL(
            ModelConfig.model_validate(values),
            noise=noise or NoiseConfig(),
            precision=precision or PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=weight_dtype,
        )

    return make
