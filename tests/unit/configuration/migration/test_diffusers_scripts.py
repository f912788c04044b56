"""diffusers' example scripts: what each kind of option becomes."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.migration.noise import levels_of_scheme
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.noise_levels import distribution_of
from tests.unit.configuration.migration.foreign_files import arguments, decision, images, migrate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "dog", 5)


def _migrate(folder: Path, script: str = "train_dreambooth_lora_sdxl", **options: object) -> Draft:
    given = {
        "pretrained_model_name_or_path": "a/b",
        "instance_data_dir": folder.as_posix(),
        "instance_prompt": "a photo of sks dog",
        **options,
    }
    return migrate(f"accelerate launch {script}.py {arguments(given)}")


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (
            {},
            {
                "lora_rank": 4,
                "lora_alpha": 4,
                "train_batch_size": 4,
                "learning_rate": 1e-4,
                "lr_scheduler": "constant",
            },
        ),
        ({"rank": 16}, {"lora_rank": 16, "lora_alpha": 16}),
        ({"use_dora": True}, {"use_dora": True}),
        ({"max_train_steps": 500}, {"max_train_steps": 500}),
        ({"lr_scheduler": "cosine"}, {"lr_warmup_steps": 500}),
        ({"lr_warmup_steps": 0}, {"lr_warmup_steps": None}),
        (
            {
                "learning_rate": 1e-4,
                "scale_lr": True,
                "train_batch_size": 2,
                "gradient_accumulation_steps": 3,
            },
            {"learning_rate": 6e-4},
        ),
        ({"use_8bit_adam": True}, {"optimizer": "bnb-adamw8bit"}),
        (
            {"optimizer": "prodigy", "prodigy_safeguard_warmup": False, "learning_rate": 1},
            {"optimizer": "prodigy", "learning_rate": 1},
        ),
        (
            {"adam_weight_decay": 0.01},
            {"optimizer_config": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}},
        ),
        ({"snr_gamma": 5.0}, {"snr_gamma": 5.0}),
        (
            {"noise_offset": 0.1},
            {"offset_noise": True, "noise_offset": 0.1, "noise_offset_probability": 1.0},
        ),
        ({"mixed_precision": "fp16"}, {"mixed_precision": "fp16"}),
        (
            {"checkpointing_steps": 50, "checkpoints_total_limit": 2},
            {"checkpoint_step_interval": 50, "checkpoints_total_limit": 2},
        ),
        ({"output_kohya_format": True}, {"lora_format": "comfyui"}),
        (
            {"validation_prompt": "a dog", "validation_epochs": 3},
            {"validation_prompt": "a dog", "num_validation_images": 4, "validation_step_interval": 6},
        ),
        ({"report_to": "wandb"}, {"report_to": "wandb"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_an_option_becomes_ours(folder: Path, options: dict[str, object], ours: dict[str, JsonValue]) -> None:
    config = _migrate(folder, **options).config
    assert {key: config.get(key) for key in ours} == ours


def test_images_are_cropped_to_squares_of_the_shorter_edge(folder: Path) -> None:
    entry = _migrate(folder, resolution=64, repeats=3, center_crop=True).datasets[0]
    ours = {
        "resolution": 64,
        "resolution_type": "pixel",
        "crop": True,
        "crop_aspect": "square",
        "crop_style": "center",
        "repeats": 2,
        "caption_strategy": "instanceprompt",
        "instance_prompt": "a photo of sks dog",
    }
    assert {key: entry[key] for key in ours} == ours


# 5 images: batches of 2 are 3 with the rest, 2 without; the Flux.2 scripts leave the rest out.
@pytest.mark.parametrize(
    ("script", "options", "steps", "samples"),
    [
        ("train_dreambooth_lora_sdxl", {"num_train_epochs": 3}, 9, 15),
        ("train_dreambooth_lora_sdxl", {"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 6, 15),
        ("train_dreambooth_lora_sdxl", {"num_train_epochs": 1, "repeats": 3}, 8, 15),
        ("train_dreambooth_lora_flux", {"num_train_epochs": 3}, 9, 15),
        ("train_dreambooth_lora_flux2", {"num_train_epochs": 3}, 6, 12),
    ],
)
def test_epochs_become_the_scripts_number_of_steps(
    folder: Path, script: str, options: dict[str, object], steps: int, samples: int
) -> None:
    draft = _migrate(folder, script, train_batch_size=2, **options)
    assert draft.config["max_train_steps"] == steps
    assert draft.length is not None
    assert draft.length.samples == samples


def test_the_text_to_image_script_has_defaults_of_its_own(folder: Path) -> None:
    draft = _migrate(
        folder, "train_text_to_image_lora_sdxl", instance_data_dir=None, train_data_dir=folder.as_posix()
    )
    assert draft.config["train_batch_size"] == 16
    assert draft.config["max_train_steps"] == 100
    assert draft.datasets[0]["resolution"] == 1024


def test_a_dataset_of_the_hub_is_left_to_the_user(folder: Path) -> None:
    draft = _migrate(
        folder, instance_data_dir=None, dataset_name="someone/dogs", caption_column="text", num_train_epochs=2
    )
    assert draft.datasets[0]["instance_data_dir"] == "datasets/dogs"
    assert draft.datasets[0]["caption_strategy"] == "textfile"
    assert draft.config["num_train_epochs"] == 2
    assert any("someone/dogs" in each for each in draft.to_do)


@pytest.mark.parametrize(
    ("script", "model", "ours"),
    [
        (
            "train_dreambooth_lora_flux",
            "black-forest-labs/FLUX.1-dev",
            {
                "model_flavour": "dev",
                "flux_guidance_value": 3.5,
                "flow_use_uniform_schedule": True,
                "flow_schedule_shift": 0,
            },
        ),
        (
            "train_dreambooth_lora_flux",
            "black-forest-labs/FLUX.1-schnell",
            {"model_flavour": "schnell", "flux_guidance_value": None},
        ),
        (
            "train_dreambooth_lora_flux2_klein",
            "black-forest-labs/FLUX.2-klein-base-9B",
            {"model_flavour": "klein-base-9b", "flux_guidance_value": None},
        ),
    ],
)
def test_flow_matching_is_drawn_as_in_the_scripts(
    folder: Path, script: str, model: str, ours: dict[str, JsonValue]
) -> None:
    config = _migrate(folder, script, pretrained_model_name_or_path=model).config
    assert {key: config.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (
            {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 2.0},
            {"flow_sigmoid_mean": -1, "flow_sigmoid_scale": 2, "flow_use_uniform_schedule": None},
        ),
        (
            {"weighting_scheme": "logit_normal"},
            {"flow_sigmoid_scale": 1, "flow_sigmoid_mean": None, "flow_schedule_shift": 0},
        ),
        (
            {"weighting_scheme": "mode", "mode_scale": 1.2},
            {"flow_use_mode_schedule": True, "flow_mode_schedule_scale": 1.2},
        ),
        ({"weighting_scheme": "sigma_sqrt"}, {"flow_use_uniform_schedule": True}),
    ],
    ids=str,
)
def test_a_weighting_scheme_becomes_noise_levels(
    folder: Path, options: dict[str, Any], ours: dict[str, JsonValue]
) -> None:
    model = {"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
    config = _migrate(folder, "train_dreambooth_lora_flux", **model, **options).config
    assert {key: config.get(key) for key in ours} == ours


def test_levels_of_the_scripts_are_those_of_their_formula() -> None:
    # Their place in the list of timesteps is u = sigmoid(mean + std * normal), and sigma is 1 - u there.
    keys = levels_of_scheme("logit_normal", mean=0.7, spread=1.5, scale=0)
    distribution = distribution_of(NoiseConfig.model_validate(keys))
    normal = NormalDist()
    for share in (0.1, 0.5, 0.8):
        place = 1 / (1 + math.exp(-(0.7 + 1.5 * normal.inv_cdf(share))))
        assert distribution.sigma_at(1 - share, shift=1.0) == pytest.approx(1 - place)


@pytest.mark.parametrize("key", ["with_prior_preservation", "train_text_encoder_ti", "push_to_hub"])
def test_what_is_left_out_is_named(folder: Path, key: str) -> None:
    found = decision(_migrate(folder, **{key: True}), key)
    assert found.outcome == "not translated"
    assert found.text


@pytest.mark.parametrize(
    "script",
    [
        "train_dreambooth_lora_flux_kontext",
        "train_dreambooth_lora_sd3",
        "train_controlnet_sdxl",
        "train_mine",
    ],
)
def test_another_script_is_an_error_that_names_it(folder: Path, script: str) -> None:
    with pytest.raises(ConfigError, match=script):
        _migrate(folder, script)


@pytest.mark.parametrize("key", ["pretrained_model_name_or_path", "instance_data_dir"])
def test_half_a_call_is_an_error_that_names_the_missing_option(folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        _migrate(folder, **{key: None})


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, None),
        ({"text_encoder_lr": 1e-5}, None),
        ({"train_text_encoder": True}, [5e-6]),
        ({"train_text_encoder": True, "text_encoder_lr": 1e-5}, [1e-5]),
        ({"train_text_encoder": True, "script": "train_text_to_image_lora_sdxl"}, [1e-4]),
    ],
    ids=["off", "rate alone", "default", "rate", "text to image"],
)
def test_text_encoders_are_trained_with_the_scripts_rate(
    folder: Path, options: dict[str, object], rates: list[float] | None
) -> None:
    draft = _migrate(folder, **options)  # type: ignore[arg-type]
    assert draft.config.get("train_text_encoder", False) is (rates is not None)
    assert draft.config.get("text_encoder_lr") == rates


def test_flipped_images_are_mirrored(folder: Path) -> None:
    (entry,) = _migrate(folder, "train_dreambooth_lora_sdxl", random_flip=True).datasets
    assert entry["random_flip"] is True
