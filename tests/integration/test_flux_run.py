"""Runs on the tiny Flux.1 model: what only this family does."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from simpletuner import cli
from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.run_folder import ADAPTER_FILE
from simpletuner.helpers.models.flux.tiny import save_tiny_flux
from tests.integration.family_runs import FLUX, IMAGES, image_in
from tests.integration.flux_pipelines import TEXT_TO_IMAGE, sample, stock, tiny_flux
from tests.integration.tiny_runs import TLORA, TinyRun

TARGETS = {"apply_preset": {"target_module": list(FLUX.targets)}}


def test_pictures_of_the_sample_command_are_those_of_the_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = FLUX.run(tmp_path)
    save_tiny_flux(tmp_path / "other", seed=9)
    keys = {
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "flow_schedule_shift": 2.0,
        "pretrained_transformer_model_name_or_path": str(tmp_path / "other"),
        "base_model_precision": "int8-torchao",
        "text_encoder_2_precision": "int8-torchao",
    }
    assert run.run(**keys, **IMAGES) == 0
    arguments = ["--prompt", "a photo of a cat", "--size", "64x80", "--steps", "3", "--seed", "5"]
    adapter = str(run.output_dir / ADAPTER_FILE)
    caplog.set_level(logging.INFO, logger="simpletuner")
    caplog.clear()
    result = CliRunner().invoke(
        cli.app, ["sample", "--adapter", adapter, *arguments, "--output", str(tmp_path / "samples")]
    )
    assert result.exit_code == 0, result.output
    assert caplog.text.count("linear layers in int8-torchao") == 2, "transformer and T5"
    validated = image_in(run.output_dir / "validation" / "step-4")
    difference = np.abs(image_in(tmp_path / "samples") - validated)
    assert difference.max() <= 1, "shift, formats, components and ranks come from the adapter's file"


def test_the_sample_command_refuses_what_the_family_cannot_do(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    assert run.run(max_train_steps=1, flux_attention_masked_training=True) == 0
    adapter = str(run.output_dir / ADAPTER_FILE)
    arguments = ["--prompt", "a cat", "--size", "64", "--steps", "2", "--guidance-real", "2"]
    result = CliRunner().invoke(
        cli.app, ["sample", "--adapter", adapter, *arguments, "--output", str(tmp_path / "samples")]
    )
    assert isinstance(result.exception, ConfigError)
    assert "--guidance-real" in str(result.exception)
    assert re.search(r"--guidance-real +2 .*flux_attention_masked_training", str(result.exception))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    "lycoris",
    [
        {"algo": "lokr", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4, "factor": 4, **TARGETS},
        {"algo": "lora", "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4, **TARGETS},
        {**TLORA, **TARGETS, "tlora_init": "vanilla"},
    ],
    ids=["lokr", "lora", "vanilla"],
)
def test_other_adapters_train_on_the_same_layers(tmp_path: Path, lycoris: dict[str, Any]) -> None:
    run = FLUX.run(tmp_path, lycoris)
    assert run.run(max_train_steps=2, mixed_precision="bf16") == 0
    assert len({key.split(".")[0] for key in load_file(run.output_dir / ADAPTER_FILE)}) == FLUX.num_layers


@pytest.mark.parametrize(
    ("target", "num_layers"), [("all+ffs", FLUX.num_layers + 1), ("context", 2 * 4), (None, 2 * 8 + 2 * 3)]
)
def test_peft_lora_trains_the_named_layers_and_diffusers_loads_all_of_them(
    tmp_path: Path, target: str | None, num_layers: int
) -> None:
    run = FLUX.run(tmp_path)
    keys = {"lora_type": "standard", "lora_rank": 4, "lora_alpha": 2, "learning_rate": 0.05}
    assert run.run(**keys, flux_lora_target=target, **IMAGES) == 0
    file = run.output_dir / ADAPTER_FILE
    tensors = load_file(file)
    assert all(key.startswith("transformer.") for key in tensors)
    assert len(tensors) == 2 * num_layers
    pipeline = TEXT_TO_IMAGE.make(stock)
    base = sample(pipeline)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    layers = [
        name for name, module in pipeline.transformer.named_modules() if name.endswith("lora_A.default_0")
    ]
    assert len(layers) == num_layers, "the stock loader reports success with no effect"
    assert np.abs(sample(pipeline) - base).max() > 1e-4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_flavour": "pro"}, '"pro": must be one of dev, krea, kontext, schnell.'),
        (
            {"model_flavour": "schnell", "flux_guidance_value": 3.5},
            "model_flavour schnell has no guidance embedding",
        ),
        ({"aspect_bucket_alignment": 24}, "24: must be a multiple of 16. Use 64."),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr  means nothing to model_family flux."),
        ({"pretrained_t5_model_name_or_path": "t5.safetensors"}, "t5.safetensors is a single file"),
        ({"text_encoder_3_precision": "int8-torchao"}, "flux has 2 text encoders"),
        ({"flux_lora_target": "everything"}, '"everything": must be one of all, all+ffs'),
        ({"flux_lora_target": "all", "peft_lora_target_modules": "to_q"}, "names other layers than"),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            "flow_use_beta_schedule  ",
        ),
        ({"flow_schedule_shift": 3, "flow_schedule_auto_shift": True}, "3 has no effect with"),
        ({"flux_guidance_min": 5}, "5 is above flux_guidance_max 4. Lower it."),
        ({"prediction_type": "epsilon"}, "flux predicts flow_matching."),
        ({"validation_noise_scheduler": "ddim"}, "model_family flux is sampled with euler."),
        (
            {"flux_attention_masked_training": True, "validation_guidance_real": 2},
            "validation_guidance_real  2 does not work with flux_attention_masked_training",
        ),
    ],
)
def test_what_flux_has_not_is_refused_while_the_configuration_is_read(
    tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    (tmp_path / "t5.safetensors").touch()
    with pytest.raises(ConfigError) as caught:
        FLUX.run(tmp_path).config(**keys)
    assert message in str(caught.value)
    assert "1 problem" in str(caught.value)


def test_keys_of_flow_matching_do_nothing_in_a_diffusion_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        TinyRun(tmp_path).config(flow_schedule_shift=3, flux_guidance_value=3.5, validation_guidance_real=2)
    assert str(caught.value).count("means nothing to model_family sdxl. Remove it.") == 1
    config = TinyRun(tmp_path).config(flow_schedule_shift=3, flux_guidance_value=3.5)
    idle = {each.key for each in config.decisions if each.outcome == "no effect"}
    assert idle == {"flow_schedule_shift", "flux_guidance_value"}
    assert config.noise.flow_schedule_shift is None


def test_keys_of_diffusion_have_no_effect_and_sizes_are_those_that_the_pipeline_makes(tmp_path: Path) -> None:
    config = FLUX.run(tmp_path).config(snr_gamma=5, validation_resolution="100x64")
    outcomes = {each.key: each.outcome for each in config.decisions}
    assert outcomes == {"snr_gamma": "no effect", "validation_resolution": "translated"}
    assert config.noise.snr_gamma is None
    assert [str(size) for size in config.validation.validation_resolution] == ["96x64"]


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    keys: dict[str, object] = {
        "lora_type": "standard",
        "flux_lora_target": "context",
        "flow_schedule_shift": 3,
    }
    resolved = run.config(**keys).resolved()
    again = FLUX.run(tmp_path / "again").config(**json.loads(json.dumps(resolved)))
    assert again.resolved() == resolved
    assert again.adapter.peft_lora_target_modules == ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")


def test_masked_attention_trains_and_makes_pictures(tmp_path: Path) -> None:
    run = FLUX.run(tmp_path)
    assert run.run(max_train_steps=2, flux_attention_masked_training=True, **IMAGES) == 0
    assert (run.output_dir / "validation" / "step-2" / "grid.png").is_file()


@pytest.mark.parametrize(
    "keys",
    [
        {"base_model_precision": "int8-torchao", "text_encoder_2_precision": "int8-torchao"},
        {"enable_group_offload": True, "gradient_checkpointing": True},
    ],
    ids=["int8", "offloaded"],
)
def test_memory_savers_train_and_leave_an_adapter_for_the_whole_model(
    tmp_path: Path, keys: dict[str, object]
) -> None:
    run = FLUX.run(tmp_path)
    assert run.run(max_train_steps=2, mixed_precision="bf16", **keys, **IMAGES) == 0
    assert (run.output_dir / "validation" / "step-2" / "grid.png").is_file()
    pipeline = TEXT_TO_IMAGE.make(stock)
    adapter = load_into_pipeline(pipeline, run.output_dir / ADAPTER_FILE)
    assert adapter.num_layers == FLUX.num_layers
    assert np.isfinite(sample(pipeline)).all()


def test_a_single_file_gives_the_transformer(tmp_path: Path) -> None:
    file = tmp_path / "transformer.safetensors"
    weights = load_file(tiny_flux() / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{key}": weight for key, weight in weights.items()}, file)
    run, whole = FLUX.run(tmp_path / "file"), FLUX.run(tmp_path / "folder")
    assert run.run(max_train_steps=1, pretrained_transformer_model_name_or_path=str(file)) == 0
    assert whole.run(max_train_steps=1) == 0
    found, expected = (load_file(each.output_dir / ADAPTER_FILE) for each in (run, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
