"""What validate prints of a run, and what it warns of."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.made_references import Canny
from simpletuner.helpers.configuration.schema.references import ReferenceConfig
from simpletuner.helpers.configuration.schema.sections import RunConfig, ValidationPrompt
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.data.phases import even
from simpletuner.helpers.data.preview import DatasetPreview, preview
from simpletuner.helpers.errors import ConfigError, DataError
from simpletuner.helpers.models import registry
from simpletuner.helpers.training import accelerator, device, plan, preparing
from simpletuner.helpers.training.device import LARGEST_ON_CPU, billions, device_name, refuse_cpu
from simpletuner.helpers.training.expected_epochs import calendar_of
from simpletuner.helpers.training.plan import plan_lines

TLORA = {"algo": "tlora", "multiplier": 1.0, "linear_dim": 8, "linear_alpha": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of one size."""
    images = tmp_path / "images"
    images.mkdir()
    for name in "abc":
        Image.new("RGB", (128, 128)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(f"caption {name}")
    return tmp_path


def run_of(folder: Path, *, lycoris: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    values = {
        "model_family": "sdxl",
        "pretrained_model_name_or_path": "simpletuner/demo/sdxl",
        "lora_type": "lycoris",
        "lycoris_config": TLORA | (lycoris or {}),
        "data_backend_config": [{"id": "mine", "instance_data_dir": str(folder / "images")}],
        "output_dir": str(folder / "output"),
        "cache_dir_vae": str(folder / "cache"),
        "resolution": 64,
        "aspect_bucket_alignment": 8,
        "max_train_steps": 120,
        **keys,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(folder / "config.json", families=registry.specs())


def lines(config: RunConfig) -> str:
    return "\n".join(plan_lines(config, registry.specs()[config.model.model_family]))


def test_the_plan_names_all_that_a_run_does(folder: Path) -> None:
    config = run_of(
        folder,
        train_batch_size=2,
        validation_prompt="a dog",
        validation_resolution="64,64x128",
        validation_step_interval=50,
        validation_epoch_interval=30,
        checkpoint_epoch_interval=1,
        report_to="tensorboard",
        lora_format="comfyui",
    )
    text = lines(config)
    for part in (
        "5 million weights",
        "T-LoRA, rank 8",
        "expected mean active rank 4.0 of 8",
        "mine: 3 images",
        "no crop; 1 bucket: 64x64: 3; none is enlarged",
        "3 images have one, for instance a.png: 'caption a'",
        "120 steps of 2 images",
        "60 epochs of 2 batches",
        "2 images of 64x64, 64x128 every 50 steps and every 30 epochs and at the end",
        "checkpoints every 500 steps and every 1 epoch,",
        "pytorch_lora_weights_comfyui.safetensors",
        "tensorboard",
        str(folder / "output"),
    ):
        assert part in text
    assert "warning" not in text


@pytest.mark.parametrize(("images", "number"), [("comparison", 2), ("ema_only", 1), ("none", 1)])
def test_the_plan_counts_files_and_images_of_the_average(folder: Path, images: str, number: int) -> None:
    keys = {"validation_prompt": "a dog", "validation_resolution": "64", "lora_format": "comfyui"}
    text = lines(run_of(folder, use_ema=True, ema_validation=images, **keys))
    assert f"{number} image{'s' if number > 1 else ''} of 64x64" in text
    for name in ("pytorch_lora_weights.ema.safetensors", "pytorch_lora_weights_comfyui.ema.safetensors"):
        assert name in text
        assert name not in lines(run_of(folder, **keys))


def test_images_without_a_caption_are_not_counted_among_those_with_one(folder: Path) -> None:
    (folder / "images/b.txt").unlink()
    assert "2 images have one" in lines(run_of(folder))


@pytest.mark.parametrize(("number", "more"), [(6, ""), (7, " and 1 more")])
def test_six_buckets_are_listed_and_the_others_counted(folder: Path, number: int, more: str) -> None:
    for index in range(1, number):
        Image.new("RGB", (128 + 64 * index, 128)).save(folder / "images" / f"wide{index}.png")
    text = lines(run_of(folder))
    assert f"{number} buckets: " in text
    (listed,) = [line.partition("buckets: ")[2] for line in text.splitlines() if "buckets: " in line]
    assert listed.partition(";")[0].count(": ") == 6
    assert (" more;" in listed, f"{more};" in listed) == (bool(more), True)


def test_steps_are_estimated_once_a_dataset_is_not_read_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "one").mkdir()
    Image.new("RGB", (128, 128)).save(folder / "one" / "a.png")
    data = [{"id": name, "instance_data_dir": str(folder / name)} for name in ("images", "one")]
    config = run_of(folder, data_backend_config=data)
    assert "about" not in lines(config)
    monkeypatch.setattr("simpletuner.helpers.data.preview.MOST_HEADERS", 2)
    assert "about 30 epochs of 4 batches" in lines(config)


def test_one_epoch_is_one(folder: Path) -> None:
    assert "; 1 epoch of 3 batches" in lines(run_of(folder, max_train_steps=3))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"validation_prompt": "a dog", "validation_disable": True}, "no images"),
        ({}, "no images"),
        ({"checkpoint_step_interval": 0}, "a checkpoint at the end"),
        ({"checkpoint_step_interval": 7}, "checkpoints every 7 steps"),
    ],
    ids=str,
)
def test_what_is_off_is_named_as_off(folder: Path, keys: dict[str, Any], part: str) -> None:
    assert part in lines(run_of(folder, **keys))


def test_what_became_of_simpletuner_s_keys_is_one_block(folder: Path) -> None:
    images = str(folder / "images")
    dataset = {"id": "mine", "instance_data_dir": images, "write_batch_size": 1, "max_workers": 2}
    text = lines(run_of(folder, optimizer="adamw_bf16", quantize_via="cpu", data_backend_config=[dataset]))
    block = text[text.index("  keys ") :].splitlines()
    assert " ".join(block[0].split()) == "keys 1 key translated, 3 without effect here:"
    assert [line.split()[0] for line in block[1:4]] == ["optimizer", "quantize_via:", "write_batch_size,"]
    defaults = next(line for line in block if line.startswith("  defaults"))
    assert "max_grad_norm 1.0 (there 2.0)" in defaults
    plain = lines(run_of(folder, defaults="ours"))
    assert "  keys " not in plain
    assert "  defaults " not in plain


def test_the_start_of_a_run_says_what_became_of_its_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparing, "expected_mean_rank", lambda *_, **__: None)
    components = SimpleNamespace(scheduler=SimpleNamespace(config={}))
    context: Any = SimpleNamespace(
        config=run_of(folder, quantize_via="cpu"),
        family=SimpleNamespace(spec=registry.specs()["sdxl"], components=components),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        data=SimpleNamespace(calendar=even(1)),
    )
    with caplog.at_level(logging.INFO):
        preparing.report_plan(context)
    assert "quantize_via: no effect" in caplog.text


def test_datasets_that_follow_each_other_stand_in_the_plan(folder: Path) -> None:
    entry = {"instance_data_dir": str(folder / "images")}
    entries = [
        {"id": "small", **entry, "end_step": 40},
        {"id": "large", **entry, "start_step": 41, "repeats": 1},
        {"id": "late", **entry, "start_step": 121},
    ]
    text = lines(run_of(folder, data_backend_config=entries))
    # 40 steps are 13 epochs of 3 and one that is cut, 80 steps are 13.3 epochs of 6.
    assert re.search(r"steps +120 steps of 1 image on each process; 27\.3 epochs\n", text)
    assert re.search(
        r"\n +from step 1: small; epochs of 3 batches\n +from step 41: large; epochs of 6 ", text
    )
    assert "warning     dataset late takes part in none of the 120 steps" in text


def test_mirrored_images_stand_in_the_plan(folder: Path) -> None:
    entry = {"id": "mine", "instance_data_dir": str(folder / "images"), "random_flip": True}
    assert "no crop, every second pass mirrored; 1 bucket" in lines(
        run_of(folder, data_backend_config=[entry])
    )


def test_validate_refuses_an_epoch_without_data(folder: Path) -> None:
    entry = {"id": "mine", "instance_data_dir": str(folder / "images"), "end_epoch": 2}
    with pytest.raises(DataError, match=r"No dataset takes part in step 7, where epoch 3 begins"):
        lines(run_of(folder, data_backend_config=[entry]))


def test_a_slider_balances_in_each_part_of_the_run(folder: Path) -> None:
    entry = {"instance_data_dir": str(folder / "images")}
    entries = [
        {"id": "more", **entry, "slider_strength": 1},
        {"id": "less", **entry, "slider_strength": -1, "end_step": 60},
    ]
    text = lines(run_of(folder, data_backend_config=entries, slider_lora_target=True, lora_type="standard"))
    assert text.count("slider_strength is positive in every dataset") == 1


def test_a_flavour_with_another_model_under_its_name_is_a_warning(folder: Path) -> None:
    spec = registry.specs()["flux2"]
    keys = {"model_family": "flux2", "aspect_bucket_alignment": 16, "pretrained_model_name_or_path": None}
    warned = plan.warnings_of(run_of(folder, model_flavour="klein-9b", **keys), spec, calendar=even(1))
    assert [text for text in warned if "klein-base-9b" in text]
    for changes in ({"model_flavour": "klein-base-9b"}, {"model_flavour": "klein-9b", "defaults": "ours"}):
        warned = plan.warnings_of(run_of(folder, **keys, **changes), spec, calendar=even(1))
        assert not [text for text in warned if "klein" in text]


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"max_train_steps": None}, "max_train_steps is not set"),
        ({"lr_warmup_steps": 121}, "lr_warmup_steps 121"),
        ({"lycoris": {"tlora_alpha": 9.0}}, "under a quarter"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "an SNR of zero"),
    ],
    ids=str,
)
def test_what_a_person_may_not_have_meant_is_a_warning(
    folder: Path, keys: dict[str, Any], warning: str
) -> None:
    assert warning not in lines(run_of(folder))
    assert warning in lines(run_of(folder, **keys))


@pytest.mark.parametrize(("repeats", "warned"), [(0, True), (9, False)])
def test_a_folder_of_kohyas_names_its_repeats(folder: Path, repeats: int, warned: bool) -> None:
    kohyas = (folder / "images").rename(folder / "10_sks dog")
    entry = {"id": "mine", "instance_data_dir": str(kohyas), "repeats": repeats}
    assert ('"repeats": 9' in lines(run_of(folder, data_backend_config=[entry]))) is warned


def test_a_folder_of_kohyas_folders_names_the_datasets_to_make(folder: Path) -> None:
    (folder / "images" / "10_sks dog").mkdir()
    text = lines(run_of(folder))
    assert '"10_sks dog"' in text
    assert '"repeats": 9' in text


def test_a_run_of_many_steps_or_without_a_schedule_needs_no_max_train_steps(folder: Path) -> None:
    assert "not set" not in lines(run_of(folder, max_train_steps=None, num_train_epochs=100)).replace(
        "caption_strategy is not set", ""
    )
    assert "max_train_steps is not set" not in lines(
        run_of(folder, max_train_steps=None, lora_type="standard")
    )


@pytest.mark.parametrize(("epochs", "warns"), [(99, True), (100, False)])
def test_t_lora_takes_a_hundred_steps_or_a_given_number(folder: Path, epochs: int, warns: bool) -> None:
    keys = {"max_train_steps": None, "num_train_epochs": epochs, "gradient_accumulation_steps": 3}
    text = lines(run_of(folder, **keys))
    assert f"{epochs} steps of 3 images" in text
    assert ("max_train_steps is not set" in text) is warns


def test_the_examples_own_images_and_prompt_are_told_on_another_model_than_the_demos(folder: Path) -> None:
    data = [{"id": "mine", "instance_data_dir": "simpletuner/demo/photo", "instance_prompt": "sks cat"}]
    keys = {"data_backend_config": data, "validation_prompt": "a photo of sks cat on a beach"}
    assert "example's" not in lines(run_of(folder, **keys))
    text = lines(run_of(folder, pretrained_model_name_or_path="somebody/else", **keys))
    assert "instance_data_dir of dataset mine" in text
    assert "validation_prompt is still the example's" in text


@pytest.mark.parametrize(
    ("lycoris", "warning"),
    [
        (
            {"apply_preset": {"target_module": ["Atention"]}},
            "Atention matches no layer of sdxl. Did you mean Attention?",
        ),
        ({"apply_preset": {"target_module": ["Flux2Attention"]}}, "Flux2Attention matches no layer of sdxl."),
        ({"linear_dim": 641}, "linear_dim 641 is above 640"),
        ({"linear_dim": 640}, None),
        (
            {"linear_dim": 641, "apply_preset": {"target_module": ["Attention", "UNetMidBlock2DCrossAttn"]}},
            "linear_dim 641 is above 640",
        ),
        (
            {
                "linear_dim": 641,
                "apply_preset": {"target_module": ["Attention"], "exclude_name": [".*down.*"]},
            },
            None,
        ),
        ({"linear_dim": 1280, "apply_preset": {"target_module": ["UNetMidBlock2DCrossAttn"]}}, None),
        ({"apply_preset": {"target_name": ["mid_block.*"]}, "linear_dim": 641}, None),
    ],
    ids=str,
)
def test_targets_and_rank_are_held_against_the_familys_own_layers(
    folder: Path, lycoris: dict[str, Any], warning: str | None
) -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    text = lines(run_of(folder, lycoris=lycoris, pretrained_model_name_or_path=base, allow_cpu=True))
    assert ("warning" in text) is (warning is not None)
    assert warning is None or warning in text


def test_a_dataset_of_which_no_image_can_be_used_is_refused(folder: Path) -> None:
    broken = folder / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no image")
    entry = {"id": "broken", "instance_data_dir": str(broken), "instance_prompt": "x"}
    with pytest.raises(DataError, match=r"'broken': no image in .* can be used \(a\.png: "):
        lines(run_of(folder, data_backend_config=[entry]))


def test_a_single_file_marked_v_pred_contradicts_epsilon(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({"v_pred": np.zeros(0), "ztsnr": np.zeros(0), "model.diffusion_model.x": np.zeros(3)}, file)
    epsilon = run_of(folder, pretrained_model_name_or_path=str(file), prediction_type="epsilon")
    assert "marked v_pred" in lines(epsilon)
    assert "SNR of zero" in lines(epsilon)
    assert "v_pred" not in lines(run_of(folder, pretrained_model_name_or_path=str(file)))


def test_a_missing_package_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.helpers.io.optional.find_spec", lambda _: None)
    assert "which is not installed" in lines(run_of(folder, report_to="tensorboard"))


def test_a_damaged_image_is_told_and_the_valid_ones_counted(folder: Path) -> None:
    (folder / "images/d.png").write_bytes(b"no image")
    text = lines(run_of(folder))
    assert "mine: 4 images" in text
    assert "d.png" in text


@pytest.mark.parametrize(
    ("has_gpu", "allow_cpu", "warns"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_a_large_model_without_a_gpu_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, allow_cpu: bool, warns: bool
) -> None:
    monkeypatch.setattr(plan, "has_gpu", lambda: has_gpu)
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    config = run_of(folder, pretrained_model_name_or_path=base, allow_cpu=allow_cpu)
    assert ("no GPU was found" in lines(config)) is warns


def test_has_gpu_looks_for_the_drivers_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device, "_GPU_FILES", (str(tmp_path / "nvidia0"),))
    assert not device.has_gpu()
    (tmp_path / "nvidia0").touch()
    assert device.has_gpu()


def test_a_large_denoiser_trains_on_the_cpu_only_if_allowed(folder: Path) -> None:
    cpu, large = torch.device("cpu"), LARGEST_ON_CPU + 1
    with pytest.raises(ConfigError, match=r"allow_cpu to true"):
        refuse_cpu(run_of(folder), cpu, num_weights=large)
    refuse_cpu(run_of(folder, allow_cpu=True), cpu, num_weights=large)
    refuse_cpu(run_of(folder), torch.device("cuda"), num_weights=large)
    refuse_cpu(run_of(folder), torch.device("mps"), num_weights=large)
    refuse_cpu(run_of(folder), cpu, num_weights=LARGEST_ON_CPU)
    refuse_cpu(run_of(folder), cpu, num_weights=None)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (5_400_000, "5 million"),
        (999_000_000, "999 million"),
        (10**9, "1.0 billion"),
        (2_570_000_000, "2.6 billion"),
    ],
)
def test_weights_are_counted_in_billions_from_one_on(number: int, words: str) -> None:
    assert billions(number) == words


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_used_where_it_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    monkeypatch.setattr(accelerator, "Accelerator", lambda **_: SimpleNamespace(scaler=None))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        accelerator.build_accelerator(run_of(folder, allow_tf32=allowed))
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_device_is_named_in_words() -> None:
    assert device_name(torch.device("cpu")).startswith("cpu, ")
    assert "Mac" in device_name(torch.device("mps"))


@pytest.mark.parametrize(
    ("keys", "dataset", "unread"),
    [
        ({"maximum_image_size": 200}, {"crop": True}, ["maximum_image_size"]),
        ({"target_downsample_size": 200}, {"crop": True}, ["target_downsample_size"]),
        ({"maximum_image_size": 200, "target_downsample_size": 100}, {"crop": True}, []),
        ({"maximum_image_size": 200, "target_downsample_size": 64}, {"crop": True}, []),
        ({"maximum_image_size": 200, "target_downsample_size": 64}, {}, []),
        ({"max_upscale_threshold": 0}, {"crop": True}, ["max_upscale_threshold"]),
        ({}, {"crop_aspect": "random", "crop_aspect_buckets": [1]}, ["crop_aspect_buckets"]),
        (
            {"max_upscale_threshold": 0},
            {"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1]},
            [],
        ),
    ],
)
def test_a_size_without_effect_is_named_once_with_its_datasets(
    folder: Path, keys: dict[str, Any], dataset: dict[str, Any], unread: list[str]
) -> None:
    datasets = [{"id": name, "instance_data_dir": str(folder / "images"), **dataset} for name in "xy"]
    config = run_of(folder, data_backend_config=datasets, **keys)
    spec = registry.specs()["sdxl"]
    found = [text for text in plan.warnings_of(config, spec, calendar=even(6)) if "no effect" in text]
    assert [text.split()[0] for text in found] == unread
    assert all("(dataset x, y)" in text for text in found)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "rank 8; learning rate 0.0003; to the end"),
        ({"text_encoder_lr": "1e-5,0"}, "rank 8; learning rate 1e-05, 0; to the end"),
        ({"text_encoder_lora_rank": 4, "stop_text_encoder_training": 9}, "rank 4; .*; until step 9"),
    ],
    ids=["defaults", "rates", "rank and end"],
)
def test_the_plan_names_the_text_encoders_that_are_trained(
    folder: Path, keys: dict[str, Any], line: str
) -> None:
    run = run_of(folder, train_text_encoder=True, learning_rate=3e-4, **keys)
    assert re.search(f"^  encoders +.*{line}$", lines(run), re.MULTILINE)
    assert "train_text_encoder" not in lines(run)


def test_keys_of_text_encoders_that_are_not_trained_are_named(folder: Path) -> None:
    assert "train_text_encoder" not in lines(run_of(folder, text_encoder_lr=None))
    on_demand = run_of(folder, train_text_encoder=True, learning_rate=3e-4, text_cache_ondemand=True)
    assert "text_cache_ondemand: no effect with train_text_encoder" in lines(on_demand)
    found = lines(run_of(folder, text_encoder_lr=1e-5, stop_text_encoder_training=5))
    assert "stop_text_encoder_training, text_encoder_lr: no effect" in found
    assert "encoders  " not in found


TOKEN = {"placeholder_token": "<my-cat>", "initializer_token": "cat"}


def test_captions_without_the_new_token_are_refused_as_the_run_refuses_them(folder: Path) -> None:
    with pytest.raises(DataError, match=r"<my-cat> is in none of 3 captions: for instance .caption a"):
        lines(run_of(folder, **TOKEN))
    (folder / "images" / "b.txt").write_text("a <My-Cat>")
    with pytest.raises(DataError, match=r"a caption writes it otherwise: .a <My-Cat>"):
        lines(run_of(folder, **TOKEN))


def test_the_new_token_in_captions_of_held_out_images_alone_is_refused(folder: Path) -> None:
    (folder / "others").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "others" / "a.png")
    (folder / "others" / "a.txt").write_text("a <my-cat>")
    entries = [
        {"id": "mine", "instance_data_dir": str(folder / "images")},
        {"id": "others", "instance_data_dir": str(folder / "others"), "dataset_type": "eval"},
    ]
    with pytest.raises(DataError, match=r"is in none of 3 captions"):
        lines(run_of(folder, **TOKEN, data_backend_config=entries))


def test_captions_that_were_not_read_may_have_the_new_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.preview.MOST_HEADERS", 1)
    assert "new token   <my-cat>" in lines(run_of(folder, **TOKEN))


@pytest.mark.parametrize(
    ("keys", "written"),
    [
        ({}, "pytorch_lora_weights.safetensors, learned_embeds.safetensors, "),
        (
            {"use_ema": True, "lora_format": "comfyui"},
            "pytorch_lora_weights.safetensors, learned_embeds.safetensors, "
            "pytorch_lora_weights.ema.safetensors, "
            "learned_embeds.ema.safetensors, pytorch_lora_weights_comfyui.safetensors, "
            "pytorch_lora_weights_comfyui.ema.safetensors, ",
        ),
        (
            {
                "model_type": "embedding",
                "lora_type": "standard",
                "lycoris_config": None,
                "embedding_lr": 0.01,
            },
            "learned_embeds.safetensors, ",
        ),
    ],
    ids=["beside", "with an EMA and exports", "alone"],
)
def test_the_plan_names_the_new_token_and_its_files(folder: Path, keys: dict[str, Any], written: str) -> None:
    token = {"placeholder_token": "<my-cat>", "initializer_token": "cat", "num_vectors": 2}
    (folder / "images" / "a.txt").write_text("a <my-cat>")
    run = run_of(folder, **token, **keys, learning_rate=3e-4, validation_prompt="a <my-cat>")
    found, rate = lines(run), keys.get("embedding_lr", 0.0003)
    expected = f"<my-cat>, 2 embeddings in each text encoder, from cat; learning rate {rate}"
    assert re.search(f"^  new token +{re.escape(expected)}$", found, re.MULTILINE)
    assert re.search(f"^  writes .*output: {re.escape(written)}checkpoints", found, re.MULTILINE)
    assert ("  adapter  " in found) is ("model_type" not in keys)
    assert "no validation prompt" not in found
    assert "no validation prompt has the new token <my-cat>" in lines(
        run_of(folder, **token, **keys, validation_prompt="a cat")
    )


@pytest.mark.parametrize(
    ("checkpoints", "interval", "is_named"), [(False, 2, True), (True, 2, False), (False, 1, False)]
)
def test_an_interval_without_gradient_checkpointing_is_named(
    folder: Path, checkpoints: bool, interval: int, is_named: bool
) -> None:
    config = run_of(folder, gradient_checkpointing=checkpoints, gradient_checkpointing_interval=interval)
    found = plan.warnings_of(config, registry.specs()["sdxl"], calendar=even(6))
    assert any("gradient_checkpointing_interval" in text for text in found) == is_named


@pytest.mark.parametrize(
    ("keys", "shown", "is_warned"),
    [
        ({}, "", False),
        ({"push_checkpoints_to_hub": True}, "", True),
        ({"push_to_hub": True}, "simpletuner of the login; a new one is private", False),
        (
            {"push_to_hub": True, "hub_model_id": "https://hf.co/me/cat", "model_card_private": False},
            "me/cat; a new one is public",
            False,
        ),
    ],
    ids=["none", "checkpoints alone", "by the project", "by its address"],
)
def test_the_plan_says_where_it_uploads_to(
    folder: Path, keys: dict[str, Any], shown: str, is_warned: bool
) -> None:
    text = lines(run_of(folder, **keys))
    assert ("  uploads " in text) == bool(shown)
    assert shown in text
    assert ("push_checkpoints_to_hub" in text) == is_warned


@pytest.mark.parametrize(("schedule", "is_warned"), [("cosine", True), ("constant_with_warmup", False)])
def test_a_schedule_that_decays_beside_averages_is_a_warning(
    folder: Path, schedule: str, is_warned: bool
) -> None:
    spec = registry.specs()["sdxl"]
    for optimizer, counts in (("adamw_schedulefree", is_warned), ("adamw", False)):
        found = plan.warnings_of(
            run_of(folder, optimizer=optimizer, lr_scheduler=schedule), spec, calendar=even(6)
        )
        assert any("averages" in text for text in found) == counts


def test_the_plan_says_the_strengths_of_a_slider_and_that_they_do_not_balance(folder: Path) -> None:
    entry = {"instance_data_dir": str(folder / "images")}
    more, less = entry | {"id": "more", "slider_strength": 0.5}, entry | {"id": "less"}
    text = lines(run_of(folder, data_backend_config=[more, less | {"slider_strength": -0.5}]))
    assert "slider_strength 0.5\n" in text
    assert "slider_strength -0.5\n" in text
    assert "balance" not in text
    text = lines(run_of(folder, data_backend_config=[more, less | {"slider_strength": -0.5, "repeats": 1}]))
    assert "6 at slider_strength -0.5, 3 at slider_strength 0.5" in text
    assert "positive in every" in lines(run_of(folder, data_backend_config=[more, less]))
    others = folder / "others"
    others.mkdir()
    for name, width in (("a", 128), ("b", 128), ("c", 256)):
        Image.new("RGB", (width, 128)).save(others / f"{name}.png")
    sizes = less | {"instance_data_dir": str(others), "slider_strength": -0.5}
    assert "balance" not in lines(run_of(folder, data_backend_config=[more, sizes]))
    text = lines(run_of(folder, data_backend_config=[more, sizes], train_batch_size=3))
    assert "6 at slider_strength -0.5, 3 at slider_strength 0.5" in text


def with_captions(folder: Path, text: str, **keys: Any) -> RunConfig:
    for name in "abc":
        (folder / "images" / f"{name}.txt").write_text(text)
    dataset = {"id": "mine", "instance_data_dir": str(folder / "images"), **keys}
    return run_of(folder, data_backend_config=[dataset])


def test_the_plan_says_how_many_captions_are_encoded(folder: Path) -> None:
    text = lines(with_captions(folder, "a, b, c", caption_shuffle={"enable": True, "count": 3}))
    assert "4 variants of each caption: 12 to encode" in text
    assert "variants" not in lines(with_captions(folder, "a, b, c", caption_prefix="sks"))


def test_captions_of_which_some_have_no_tags_are_a_warning(folder: Path) -> None:
    config = with_captions(folder, "a, b, c", caption_shuffle={"enable": True})
    (folder / "images" / "b.txt").write_text("a cat")
    assert re.search(r"warning .*mine: .*split_on.*1 of 3.*b\.png", lines(config))


def test_what_the_run_refuses_of_captions_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.caption_variants.MAX_VARIANTS", 5)
    with_captions(folder, "a cat")
    shuffle = {"enable": True, "position_start": 2}
    datasets = [
        {"id": name, "instance_data_dir": str(folder / "images"), "caption_shuffle": shuffle}
        for name in ("one", "two")
    ]
    config = run_of(folder, data_backend_config=datasets)
    with pytest.raises(DataError) as caught:
        lines(config)
    for part in ("'one': caption_shuffle.split_on", "'two': caption_shuffle.split_on", "12 variants"):
        assert part in str(caught.value)


def test_tags_of_captions_that_were_not_read_may_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simpletuner.helpers.data.preview.MOST_HEADERS", 2)
    config = with_captions(folder, "a cat", caption_shuffle={"enable": True})
    assert "warning     dataset mine: caption_shuffle.split_on" in lines(config)


def test_masks_that_are_missing_end_validation_as_they_end_the_run(folder: Path) -> None:
    masks = folder / "masks"
    masks.mkdir()
    for name in "ab":
        Image.new("L", (64, 64), 200).save(masks / f"{name}.png")
    entries = [
        {"id": "mine", "instance_data_dir": str(folder / "images"), "conditioning_data": "masks"},
        {"id": "masks", "instance_data_dir": str(masks), "conditioning_type": "mask"},
    ]
    with pytest.raises(DataError, match=r"no mask.*c\.png"):
        lines(run_of(folder, data_backend_config=entries))
    Image.new("L", (64, 64), 200).save(masks / "c.png")
    text = lines(run_of(folder, data_backend_config=entries))
    assert "mine: 3 images" in text
    assert re.search(r"masks +mine: .*masks", text)
    entries = [{"id": "mine", "instance_data_dir": str(folder / "images"), "alpha_mask": True}]
    assert re.search(r"masks +mine: alpha", lines(run_of(folder, data_backend_config=entries)))
    assert not re.search(r"^ +masks ", lines(run_of(folder)), re.MULTILINE)


def with_references(folder: Path, flavours: set[str]) -> tuple[RunConfig, ModelSpec]:
    """A run with references of other sizes, and a spec whose flavours take references."""
    spec = registry.specs()["sdxl"]
    editing = replace(spec, reference_flavours=frozenset(flavours))
    references = folder / "before"
    references.mkdir(exist_ok=True)
    for name, size in (("a", (128, 128)), ("b", (128, 128)), ("c", (256, 64))):
        Image.new("RGB", size, (9, 9, 9)).save(references / f"{name}.png")
    config = run_of(folder)
    datasets = (config.datasets[0].model_copy(update={"conditioning_data": ("before",)}),)
    entry = ReferenceConfig(id="before", instance_data_dir=references, conditioning_type="reference_loose")
    return config.model_copy(update={"datasets": datasets, "references": (entry,)}), editing


def test_references_stand_in_the_plan_and_part_batches(folder: Path) -> None:
    config, spec = with_references(folder, {"base"})
    text = "\n".join(plan_lines(config, spec))
    assert re.search(r"references +mine: before \(reference_loose\)", text)
    assert not re.search(r"^ +masks ", text, re.MULTILINE)
    made = config.datasets[0].model_copy(update={"conditioning": (Canny(type="canny"),)})
    text = "\n".join(plan_lines(config.model_copy(update={"datasets": (made,)}), spec))
    assert re.search(r"references +mine: before \(reference_loose\), canny", text)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"train_batch_size": 3})}
    )
    several = calendar_of(config, [preview_of(config)]).stretches[0].length
    without = config.model_copy(update={"references": (), "datasets": run_of(folder).datasets})
    assert (several, calendar_of(without, [preview_of(without)]).stretches[0].length) == (2, 1)
    (folder / "before" / "b.png").unlink()
    with pytest.raises(DataError, match=r"no reference.*b\.png"):
        list(plan_lines(config, spec))


def test_sdxl_sees_no_references(folder: Path) -> None:
    entries = [
        {"id": "mine", "instance_data_dir": str(folder / "images"), "conditioning_data": "before"},
        {
            "id": "before",
            "instance_data_dir": str(with_references(folder, set())[0].references[0].instance_data_dir),
            "conditioning_type": "reference_strict",
        },
    ]
    with pytest.raises(ConfigError, match=r"model_flavour +sdxl .*mine"):
        run_of(folder, data_backend_config=entries)


def test_a_run_takes_the_references_of_its_configuration(folder: Path) -> None:
    config, spec = with_references(folder, {"base"})
    family: Any = SimpleNamespace(spec=spec, device=torch.device("cpu"))
    data = preparing.build_data(config, family=family, watch=LoaderWatch())
    data.set_encoders(vae_identity="vae", text_identity="text")
    assert len(data.latents_requests()) == 6


def preview_of(config: RunConfig) -> DatasetPreview:
    entries = (*config.conditioning, *config.references)
    return preview(config.datasets[0], config.data, alignment=8, seed=1, reads_all=True, conditioning=entries)


@pytest.mark.parametrize(
    ("takes", "references", "is_warned"),
    [
        ("own", None, True),
        ("own", "files", False),
        ("own", "made", False),
        ("all", None, False),
        ("none", None, False),
    ],
)
def test_a_flavour_for_editing_without_references_is_a_warning(
    folder: Path, takes: str, references: str | None, is_warned: bool
) -> None:
    all_flavours = set(registry.specs()["sdxl"].flavours)
    config, spec = with_references(folder, set())
    own = config.model.model_flavour or spec.default_flavour
    flavours = {"own": {own}, "all": all_flavours, "none": set()}[takes]
    if references != "files":
        made = (Canny(type="canny"),) if references == "made" else ()
        dataset = config.datasets[0].model_copy(update={"conditioning_data": (), "conditioning": made})
        config = config.model_copy(update={"references": (), "datasets": (dataset,)})
    spec = replace(
        spec,
        flavours={**spec.flavours, "another": "some/other"} if takes == "own" else spec.flavours,
        reference_flavours=frozenset(flavours),
    )
    found = [text for text in plan.warnings_of(config, spec, calendar=even(1)) if "reference_strict" in text]
    assert bool(found) is is_warned


@pytest.mark.parametrize(
    ("images", "disabled", "is_warned"), [((), False, True), ((), True, False), (("a.png",), False, False)]
)
def test_prompts_without_references_are_a_warning_where_the_data_has_some(
    folder: Path, images: tuple[str, ...], disabled: bool, is_warned: bool
) -> None:
    config, spec = with_references(folder, {"base"})
    prompts = (ValidationPrompt(name="mine", text="a cat", images=tuple(map(Path, images))),)
    validation = config.validation.model_copy(update={"prompts": prompts, "validation_disable": disabled})
    config = config.model_copy(update={"validation": validation})
    keys = ("validation_reference_images", "mine", "user_prompt_library")
    found = plan.warnings_of(config, spec, calendar=even(1))
    assert any(all(key in text for key in keys) for text in found) is is_warned
    without = plan.warnings_of(config.model_copy(update={"references": ()}), spec, calendar=even(1))
    assert not any(keys[0] in text for text in without)


def test_the_plan_of_a_whole_model_names_its_weights_and_folders(folder: Path) -> None:
    keys = {"model_type": "full", "lora_type": "standard", "lycoris_config": None, "use_ema": True}
    text = lines(run_of(folder, **keys, layer_filter="up_blocks"))
    assert "weights     Full fine-tune of the unet: those with up_blocks in their names; bf16" in text
    assert "unet, unet_ema, checkpoints" in text
    assert "adapter" not in text.partition("writes")[0]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, "120 steps of 1 image on each process; an unknown number of epochs"),
        ({"max_train_steps": None, "num_train_epochs": 2}, "2 epochs of an unknown number of images"),
    ],
    ids=["steps", "epochs"],
)
def test_a_dataset_of_the_hub_is_not_downloaded_for_a_look(
    folder: Path, keys: dict[str, Any], steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        "simpletuner.helpers.data.preview.scan_entry", lambda entry, **_: opened.append(entry.id)
    )
    datasets = [{"id": "hub", "type": "huggingface", "dataset_name": "owner/name"}]
    text = lines(run_of(folder, data_backend_config=datasets, **keys))
    assert "hub: owner/name, downloaded by the run or by validate --data, and not checked before" in text
    assert steps in text
    assert not opened
    with pytest.raises(AttributeError):
        list(
            plan_lines(run_of(folder, data_backend_config=datasets), registry.specs()["sdxl"], reads_all=True)
        )
    assert opened == ["hub"]
