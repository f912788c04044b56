"""Tiny models on disk, copies of them that a test may break, and families made from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.models.flux2.tiny import save_tiny_flux2
from simpletuner.helpers.models.registry import load_family
from tests.unit.models.family_cases import CASES

SAVE = {name: case.save for name, case in CASES.items()} | {
    "flux2-distilled": partial(save_tiny_flux2, klein=True, is_distilled=True)
}
FAMILY_OF = {name: name.partition("-")[0] for name in SAVE}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a tiny model by its name in CASES that no test may change."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            SAVE[name](made[name])
        return made[name]

    return folder


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes copies of a tiny model that the test may change."""
    copies = 0

    def copy(name: str) -> Path:
        nonlocal copies
        copies += 1
        return Path(shutil.copytree(tiny(name), tmp_path / f"copy-{copies}"))

    return copy


@pytest.fixture(scope="session")
def make(tiny: Callable[[str], Path]) -> Callable[..., ModelFamily]:
    """Makes a family on the CPU by its name in CASES; keywords change the model's configuration."""

    def make(
        name: str,
        folder: Path | None = None,
        *,
        noise: NoiseConfig | None = None,
        precision: PrecisionConfig | None = None,
        weight_dtype: torch.dtype = torch.float32,
        **changes: object,
    ) -> ModelFamily:
        values = {"model_family": FAMILY_OF[name], "pretrained_model_name_or_path": str(folder or tiny(name))}
        context = FamilyContext(
            model=ModelConfig.model_validate(values | changes),
            noise=noise or NoiseConfig(),
            precision=precision or PrecisionConfig(),
            device=torch.device("cpu"),
            weight_dtype=weight_dtype,
        )
        return load_family(FAMILY_OF[name])(context)

    return make


@pytest.fixture(scope="session")
def tiny_sdxl(tiny: Callable[[str], Path]) -> Path:
    """A tiny SDXL that no test may change."""
    return tiny("sdxl")


@pytest.fixture
def copied_sdxl(copied: Callable[[str], Path]) -> Callable[[], Path]:
    """Makes copies of the tiny SDXL that the test may change."""
    return partial(copied, "sdxl")


@pytest.fixture(scope="session")
def sdxl(make: Callable[..., ModelFamily]) -> Callable[..., ModelFamily]:
    """Makes the SDXL family; keywords change the model's configuration."""
    return partial(make, "sdxl")
