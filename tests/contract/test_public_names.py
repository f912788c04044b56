"""The import paths, signatures and attributes that other people's code relies on."""

from __future__ import annotations

import importlib
import inspect

import diffusers
import pytest
from lycoris.modules import MODULE_LIST
from lycoris.modules import tlora as stock_tlora

from simpletuner.helpers.adapters.pipeline import MaskedDenoising
from simpletuner.helpers.training import lycoris
from simpletuner.helpers.training.trainer import Trainer
from simpletuner.helpers.training.validation import Validation

PUBLIC_NAMES = [
    ("simpletuner", "__version__"),
    ("simpletuner.train", "main"),
    ("simpletuner.lycoris_defaults", "default_lycoris_config"),
    ("simpletuner.helpers.models.sdxl.pipeline", "StableDiffusionXLPipeline"),
    ("simpletuner.helpers.models.sdxl.pipeline", "StableDiffusionXLImg2ImgPipeline"),
    ("simpletuner.helpers.models.sdxl.pipeline", "StableDiffusionXLInpaintPipeline"),
    ("simpletuner.helpers.models.flux.pipeline", "FluxPipeline"),
    ("simpletuner.helpers.models.flux2.pipeline", "Flux2Pipeline"),
    ("simpletuner.helpers.models.flux2.pipeline", "Flux2KleinPipeline"),
    ("simpletuner.helpers.training.trainer", "Trainer"),
    ("simpletuner.helpers.training.validation", "Validation"),
]

BUNDLED = [
    ("sdxl", "StableDiffusionXLPipeline"),
    ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    ("sdxl", "StableDiffusionXLInpaintPipeline"),
    ("flux", "FluxPipeline"),
    ("flux", "FluxImg2ImgPipeline"),
    ("flux", "FluxInpaintPipeline"),
    ("flux", "FluxKontextPipeline"),
    ("flux", "FluxControlNetPipeline"),
    ("flux2", "Flux2Pipeline"),
    ("flux2", "Flux2KleinPipeline"),
    ("flux2", "Flux2KleinInpaintPipeline"),
]

# Name -> (parameter, default) in order; no default is written as ...
MASK_SIGNATURES = {
    "apply_tlora_timestep_mask": [
        ("timesteps", ...), ("max_timestep", ...), ("max_rank", ...), ("min_rank", 1), ("alpha", 1.0),
    ],
    "apply_tlora_inference_mask": [
        ("timestep", ...), ("max_timestep", ...), ("max_rank", ...), ("min_rank", 1), ("alpha", 1.0),
    ],
    "clear_tlora_mask": [],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_a_public_name_can_be_imported(module: str, name: str) -> None:
    assert name in vars(importlib.import_module(module))


@pytest.mark.parametrize("name", MASK_SIGNATURES)
def test_a_mask_function_keeps_its_signature(name: str) -> None:
    parameters = inspect.signature(vars(lycoris)[name]).parameters.values()
    found = [(each.name, ... if each.default is each.empty else each.default) for each in parameters]
    assert found == MASK_SIGNATURES[name]
    assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)


def test_importing_the_mask_functions_registers_our_layer_with_lycoris() -> None:
    assert lycoris.TLORA_AVAILABLE is True
    registered = [each for each in MODULE_LIST if vars(each).get("name") == "tlora"]
    assert len(registered) == 1
    assert registered[0].__module__ == "simpletuner.helpers.adapters.tlora.layer"


def test_the_masks_are_those_that_lycoris_itself_reads() -> None:
    lycoris.apply_tlora_timestep_mask([0, 500, 1000], 1000, 64)
    try:
        mask = stock_tlora.get_timestep_mask()
        assert mask.shape == (3, 64)
        assert mask.sum(dim=1).tolist() == [64, 32, 1]
    finally:
        lycoris.clear_tlora_mask()
    assert stock_tlora.get_timestep_mask() is None

    lycoris.apply_tlora_inference_mask(750, 1000, 64, 32, 1.0)
    try:
        assert stock_tlora.get_timestep_mask().sum(dim=1).tolist() == [40]
    finally:
        lycoris.clear_tlora_mask()


@pytest.mark.parametrize(("family", "name"), BUNDLED)
def test_a_bundled_pipeline_is_diffusers_own_with_a_schedule_that_is_off(family: str, name: str) -> None:
    bundled = vars(importlib.import_module(f"simpletuner.helpers.models.{family}.pipeline"))[name]
    stock = getattr(diffusers, name)
    assert issubclass(bundled, MaskedDenoising)
    assert issubclass(bundled, stock)
    assert inspect.signature(bundled.__init__) == inspect.signature(stock.__init__)
    assert bundled._tlora_config is None


def test_validation_sets_up_and_cleans_its_pipeline() -> None:
    assert list(inspect.signature(Validation.setup_pipeline).parameters) == ["self", "validation_type"]
    assert list(inspect.signature(Validation.clean_pipeline).parameters) == ["self"]


def test_a_trainer_can_be_driven_step_by_step() -> None:
    assert list(inspect.signature(Trainer.run).parameters) == ["self"]
    assert list(inspect.signature(Trainer.train_step).parameters) == ["self", "batch"]
    assert list(inspect.signature(Trainer.apply_gradients).parameters) == ["self"]
    assert list(inspect.signature(Trainer.state_digest).parameters) == ["self"]
