"""The estimate of a run: its phases, and what each key of memory changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.estimating.device_memory import Phase
from simpletuner.helpers.estimating.estimate import Estimate, estimate
from tests.unit.estimating.conftest import Example

GIB = 2**30
KLEIN = "flux2-klein-4b-tlora"


def estimated(run: RunConfig) -> Estimate:
    found = estimate(run)
    assert found is not None
    return found


def phase(run: RunConfig, name: str) -> Phase:
    return next(each for each in estimated(run).phases if each.name == name)


def test_the_parts_are_those_of_the_page_on_memory(example: Example) -> None:
    overrides = ("gradient_checkpointing=false", "ema_device=accelerator", "use_ema=true")
    parts = phase(example("sdxl-tlora-quick", *overrides), "training").parts
    found = {name: round(number / GIB, 1) for name, number in parts.items()}
    # documentation/memory.md, SDXL with T-LoRA 16 without checkpointing, and its EMA.
    assert found == {
        "weights": 4.8,
        "adapter": 0.3,
        "gradients": 0.2,
        "optimiser state": 0.3,
        "EMA": 0.2,
        "activations": 8.2,
        "gradients of activations": 0.3,
        "context": 0.8,
    }


def test_the_peak_is_the_largest_phase(example: Example) -> None:
    found = estimated(example(KLEIN))
    assert [each.name for each in found.phases] == ["captions", "latents", "training", "validation images"]
    assert found.peak_device_bytes == max(sum(each.parts.values()) for each in found.phases)
    text = estimated(example("flux2-klein-9b-tlora"))
    assert text.peak.name == "captions"  # the text encoder is larger than the quantised denoiser


@pytest.mark.parametrize(
    ("name", "override", "least"),
    [
        ("training", "train_batch_size=2", 1.1),
        ("training", "gradient_checkpointing=false", 2),
        ("training", "resolution=1536", 1.1),
        ("training", "optimizer=lion", 0.9),
        ("training", "base_model_precision=int8-torchao", 0.6),
        ("training", "base_model_precision=nf4-bnb", 0.4),
        ("training", "mixed_precision=no", 1.5),
        ("training", "vae_cache_ondemand=true", 1.1),
        ("training", "text_cache_ondemand=true", 1.5),
        ("captions", "text_encoder_1_precision=int8-torchao", 0.5),
        ("latents", "vae_batch_size=2", 1.5),
        ("validation images", "validation_resolution=2048x2048", 1.5),
    ],
)
def test_a_key_changes_its_phase(example: Example, name: str, override: str, least: float) -> None:
    before, after = (phase(example(KLEIN, *changes), name).num_bytes for changes in ((), (override,)))
    assert (after / before > least) if least > 1 else (least < after / before < 1), after / before


def test_group_offloading_keeps_one_group_on_the_device(example: Example) -> None:
    parts = phase(example(KLEIN, "enable_group_offload=true"), "training").parts
    double_block, outside = 468 * 2**20, 2 * 195_035_136
    assert parts["weights"] == pytest.approx(double_block + outside, rel=0.01)


def test_references_are_further_tokens(example: Example) -> None:
    plain, edits = (phase(example(name), "training").parts for name in (KLEIN, "flux2-klein-edit-tlora"))
    # 512 tokens of text, 4096 of the image, and as many of its reference.
    assert edits["activations"] / plain["activations"] == pytest.approx(
        (512 + 2 * 4096) / (512 + 4096), rel=0.02
    )


def test_trained_text_encoders_stay_on_the_device(example: Example) -> None:
    run = example("sdxl-lora", "train_text_encoder=true")
    text = phase(run, "captions").parts["text encoders"]
    assert phase(run, "training").parts["text encoders"] > text
    assert phase(run, "validation images").parts["text encoders"] > text
    assert "text encoders" not in phase(example("sdxl-lora"), "training").parts


def test_guidance_by_a_second_pass_takes_twice_as_much(example: Example) -> None:
    def denoising(*overrides: str) -> int:
        size = "validation_resolution=2048x2048"
        run = example(KLEIN, size, "vae_enable_tiling=true", *overrides)
        return phase(run, "validation images").parts["denoising or decoding"]

    assert denoising() == 2 * denoising("validation_guidance=1")


def test_a_shorter_edge_as_resolution_counts_wide_images(example: Example) -> None:
    def kept(*overrides: str) -> int:
        run = example("sdxl-tlora-quick", "gradient_checkpointing=false", *overrides)
        return phase(run, "training").parts["activations"]

    assert kept("resolution_type=pixel") == pytest.approx(1.5 * kept(), rel=0.02)


def test_tiling_bounds_what_a_vae_takes(example: Example) -> None:
    large = example(KLEIN, "validation_resolution=2048x2048", "vae_enable_tiling=true")
    small = example(KLEIN)
    name = "denoising or decoding"
    assert phase(large, "validation images").parts[name] < 4 * phase(small, "validation images").parts[name]
    assert phase(example(KLEIN, "validation_disable=true"), "training")
    assert len(estimated(example(KLEIN, "validation_disable=true")).phases) == 3


def test_a_local_model_counts_with_its_own_layers(example: Example) -> None:
    run = example("demo-lora")
    assert phase(run, "training").parts["weights"] < 0.1 * GIB
    assert phase(run, "captions").parts["text encoders"] < 0.1 * GIB
    assert phase(run, "latents").parts["VAE"] < 0.1 * GIB


@pytest.mark.parametrize(
    "content",
    [
        '{"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8}',  # Stable Diffusion 1
        '{"block_out_channels": "wide"}',
        '{"attention_head_dim": [5, 10, 20], "layers_per_block": null}',
    ],
)
def test_a_model_of_another_architecture_has_no_estimate(
    example: Example, tmp_path: Path, content: str
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(content)
    assert estimate(example("sdxl-tlora-quick", f"pretrained_model_name_or_path={tmp_path}")) is None
    (tmp_path / "unet" / "config.json").write_text("{")  # unreadable: the published layers count
    assert estimate(example("sdxl-tlora-quick", f"pretrained_model_name_or_path={tmp_path}")) is not None
