"""A tiny model on disk, and copies of it that a test may break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.configuration.schema.sections import ModelConfig, NoiseConfig, PrecisionConfig
from simpletuner.helpers.models.flux2.family import Flux2
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
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


@pytest.fixture(scope="session")
def tiny_flux2(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a tiny Flux.2 by its kind (dev, klein or distilled) that no test may change."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("models") / kind
            save_tiny_flux2(made[kind], klein=kind != "dev", is_distilled=kind == "distilled")
        return made[kind]

    return folder


@pytest.fixture
def copied_flux2(tiny_flux2: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of a tiny Flux.2 that the test may change."""
    return lambda kind: Path(shutil.copytree(tiny_flux2(kind), tmp_path / f"copied-{kind}"))


@pytest.fixture
def flux2() -> Callable[..., Flux2]:
    """Makes the Flux.2 family on the CPU from a folder; keywords change the model's configuration."""

    def make(
        folder: Path,
        *,
        noise: NoiseConfig | None = None,
        precision: PrecisionConfig | None = None,
        weight_dtype: torch.dtype = torch.float32,
        **changes: object,
    ) -> Flux2:
        values = {"model_family": "flux2", "pretrained_model_name_or_path": str(folder), **changes}
        return Flux2(
            ModelConfig.model_validate(values),
            noise=noise or NoiseConfig(),
            precision=precision or PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=weight_dtype,
        )

    return make
