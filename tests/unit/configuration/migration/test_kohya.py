"""kohya's sd-scripts: what each kind of setting becomes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from pydantic import JsonValue

from simpletuner.helpers.errors import ConfigError
from tests.unit.configuration.migration.foreign_files import arguments, decision, images, kohya, migrate, toml

NETWORK = "sdxl_train_network"


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    """A folder with 10_sks dog: three images with captions."""
    images(tmp_path / "train" / "10_sks dog", 3, caption="a photo of a dog")
    return tmp_path / "train"


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"train_batch_size": 2}, {"train_batch_size": 2}),
        ({"network_dim": 16, "network_alpha": 8}, {"lora_rank": 16, "lora_alpha": 8}),
        ({"network_dim": 16, "network_alpha": 0}, {"lora_rank": 16, "lora_alpha": 16}),
        ({"network_dim": 16}, {"lora_alpha": 1}),
        (
            {},
            {"lora_rank": 4, "learning_rate": 2e-6, "gradient_checkpointing": False, "mixed_precision": "no"},
        ),
        ({"network_dropout": 0.1}, {"lora_dropout": 0.1}),
        ({"learning_rate": 1e-4, "unet_lr": 5e-5}, {"learning_rate": 5e-5}),
        ({"learning_rate": 1e-4}, {"learning_rate": 1e-4}),
        ({"max_train_steps": 100, "lr_scheduler": "cosine", "lr_warmup_steps": 10}, {"lr_warmup_steps": 10}),
        (
            {"max_train_steps": 100, "lr_scheduler": "cosine", "lr_warmup_steps": 0.25},
            {"lr_warmup_steps": 25},
        ),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, {"lr_num_cycles": 3}),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_power": 2, "learning_rate": 1e-4},
            {"lr_scheduler": "polynomial", "lr_power": 2, "lr_end": 1e-7},
        ),
        (
            {"optimizer_type": "AdamW", "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"]},
            {"optimizer": "adamw", "optimizer_config": {"weight_decay": 0.1, "betas": [0.9, 0.99]}},
        ),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1, "optimizer_args": ["d_coef=2"]},
            {
                "optimizer": "prodigy",
                "optimizer_config": {"use_bias_correction": False, "safeguard_warmup": False, "d_coef": 2},
            },
        ),
        ({"optimizer_type": "AdamW8bit"}, {"optimizer": "bnb-adamw8bit"}),
        ({"optimizer_type": "Lion"}, {"optimizer": "lion"}),
        ({"optimizer_type": "PagedAdamW8bit"}, {"optimizer": "bnb-adamw8bit-paged"}),
        ({"optimizer_type": "Adafactor"}, {"optimizer": "adafactor"}),
        ({"use_8bit_adam": True}, {"optimizer": "bnb-adamw8bit"}),
        ({"use_lion_optimizer": True}, {"optimizer": "lion"}),
        (
            {"optimizer_type": "DAdaptAdam", "learning_rate": 1},
            {"optimizer": "dadaptation", "learning_rate": 1},
        ),
        ({"min_snr_gamma": 5}, {"snr_gamma": 5}),
        ({"debiased_estimation_loss": True}, {"debiased_estimation_loss": True}),
        (
            {"noise_offset": 0.05},
            {"offset_noise": True, "noise_offset": 0.05, "noise_offset_probability": 1.0},
        ),
        (
            {"multires_noise_iterations": 6},
            {"multires_noise_iterations": 6, "multires_noise_discount": 0.3},
        ),
        (
            {"multires_noise_iterations": 8, "multires_noise_discount": 0.4},
            {"multires_noise_iterations": 8, "multires_noise_discount": 0.4},
        ),
        ({"ip_noise_gamma": 0.1}, {"input_perturbation": 0.1, "input_perturbation_steps": None}),
        ({"min_timestep": 100, "max_timestep": 900}, {"min_timestep": 100, "max_timestep": 900}),
        (
            {"loss_type": "huber", "huber_c": 0.2, "huber_schedule": "exponential"},
            {"loss_type": "huber", "huber_c": 0.2, "huber_schedule": "exponential"},
        ),
        ({"loss_type": "smooth_l1"}, {"loss_type": "smooth_l1", "huber_c": None}),
        ({"loss_type": "l2", "huber_c": 0.2}, {"loss_type": "l2", "huber_c": None}),
        ({"v_parameterization": True, "zero_terminal_snr": True}, {"prediction_type": "v_prediction"}),
        ({"mixed_precision": "bf16", "full_bf16": True}, {"mixed_precision": "bf16"}),
        ({"fp8_base": True}, {"base_model_precision": "fp8-torchao"}),
        (
            {"save_every_n_steps": 50, "save_last_n_steps": 200},
            {"checkpoint_step_interval": 50, "checkpoints_total_limit": 4},
        ),
        ({}, {"checkpoint_step_interval": 0, "checkpoints_total_limit": 0, "output_dir": "output/mine"}),
        ({"network_weights": "old.safetensors"}, {"init_lora": "old.safetensors"}),
        ({"log_with": "wandb", "wandb_run_name": "a"}, {"report_to": "wandb", "tracker_run_name": "a"}),
        ({"caption_dropout_rate": 0.05}, {"caption_dropout_probability": 0.05}),
        ({"seed": 7}, {"seed": 7}),
        ({"enable_bucket": True, "bucket_reso_steps": 12}, {"aspect_bucket_alignment": 24}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_becomes_ours(dog: Path, options: dict[str, object], ours: dict[str, JsonValue]) -> None:
    config = migrate(kohya(dog, NETWORK, options)).config
    assert {key: config.get(key) for key in ours} == ours


def test_a_plain_lora_adapts_the_layers_of_the_transformers(dog: Path) -> None:
    config = migrate(kohya(dog, NETWORK, {})).config
    assert config["lora_type"] == "standard"
    assert {"to_q", "ff.net.0.proj", "proj_in"} <= set(config["peft_lora_target_modules"])  # type: ignore[arg-type]


def test_a_lora_with_convolutions_is_lycoris(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"network_dim": 8, "network_args": ["conv_dim=4", "conv_alpha=2"]}))
    assert draft.lycoris is not None
    found = {
        key: draft.lycoris[key] for key in ("algo", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha")
    }
    assert found == {"algo": "lora", "linear_dim": 8, "linear_alpha": 1, "conv_dim": 4, "conv_alpha": 2}
    preset = draft.lycoris["apply_preset"]
    assert isinstance(preset, dict)
    assert "ResnetBlock2D" in preset["target_module"]  # type: ignore[operator]


def test_a_lycoris_network_keeps_its_arguments_but_for_idle_ones(dog: Path) -> None:
    given = ["algo=lokr", "preset=attn-mlp", "factor=8", "dora_wd=True", "rank_dropout_scale=True", "odd=1"]
    given.append("rs_lora=True")
    draft = migrate(
        kohya(
            dog, NETWORK, {"network_module": "lycoris.kohya", "network_dropout": 0.1, "network_args": given}
        )
    )
    assert draft.lycoris is not None
    assert draft.lycoris["factor"] == 8
    assert draft.lycoris["weight_decompose"] is True
    assert draft.lycoris["rs_lora"] is True
    assert "dropout" not in draft.lycoris
    assert "rank_dropout_scale" not in draft.lycoris
    found = decision(draft, "network_args")
    assert found.outcome == "approximate"
    assert "odd" in found.text
    assert decision(draft, "network_dropout").outcome == "no effect"


def test_lokr_on_a_quantised_base_adds_to_the_output(dog: Path) -> None:
    options = {"network_module": "lycoris.kohya", "network_args": ["algo=lokr"], "fp8_base": True}
    draft = migrate(kohya(dog, NETWORK, options))
    assert draft.lycoris is not None
    assert draft.lycoris["bypass_mode"] is True


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [2e-6]),
        ({"network_train_unet_only": True}, None),
        ({"cache_text_encoder_outputs": True}, None),
        ({"text_encoder_lr": 0}, None),
        ({"text_encoder_lr": 5e-5}, [5e-5]),
        ({"text_encoder_lr": [5e-5, 5e-5]}, [5e-5]),
        ({"text_encoder_lr": [0, 5e-5]}, [0, 5e-5]),
        ({"text_encoder_lr": [5e-5, 1e-5], "optimizer_type": "Prodigy", "learning_rate": 1.0}, [1.0, 1.0]),
    ],
    ids=["neither", "unet only", "cached", "rate 0", "rate", "same rates", "second", "prodigy"],
)
def test_text_encoders_are_trained_with_their_rates(
    dog: Path, options: dict[str, object], rates: list[float] | None
) -> None:
    draft = migrate(kohya(dog, NETWORK, options))
    assert draft.config.get("train_text_encoder", False) is (rates is not None)
    assert draft.config.get("text_encoder_lr") == rates
    assert decision(draft, "network_train_unet_only").outcome == "translated"


@pytest.mark.parametrize(
    ("key", "value", "outcome"),
    [
        ("noise_offset", 0, "no effect"),
        ("multires_noise_iterations", 0, "no effect"),
        ("multires_noise_discount", 0.3, "no effect"),
        ("huber_c", 0.2, "no effect"),
        ("huber_scale", 2.0, "no effect"),
        ("secondary_separator", ";;;", "not translated"),
        ("token_warmup_step", 0.5, "not translated"),
        ("shuffle_caption", True, "no effect"),
        ("keep_tokens", 2, "no effect"),
        ("color_aug", True, "not translated"),
        ("xformers", True, "no effect"),
        ("clip_skip", 2, "no effect"),
        ("max_token_length", 75, "no effect"),
        ("a_key_of_a_fork", 1, "not translated"),
        ("reg_data_dir", "reg", "not translated"),
        ("discrete_flow_shift", 3.1, "no effect"),
    ],
)
def test_what_is_left_out_is_named(dog: Path, key: str, value: object, outcome: str) -> None:
    draft = migrate(kohya(dog, NETWORK, {key: value}))
    found = decision(draft, key)
    assert (found.outcome, found.ours) == (outcome, "")
    assert found.text


def test_flipped_images_are_mirrored(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"flip_aug": True}))
    assert draft.datasets[0]["random_flip"] is True
    assert decision(draft, "flip_aug").outcome == "translated"
    assert "random_flip" not in migrate(kohya(dog, NETWORK, {"flip_aug": False})).datasets[0]


def test_every_key_of_the_command_is_decided_once(dog: Path) -> None:
    options = {
        "noise_offset": 0.1,
        "xformers": True,
        "odd": 1,
        "seed": 1,
        "min_snr_gamma": 5,
        "shuffle_caption": True,
    }
    draft = migrate(kohya(dog, NETWORK, options))
    keys = [each.key for each in draft.decisions]
    assert len(keys) == len(set(keys))
    assert set(options) | {"train_data_dir", "network_module", "resolution", "caption_extension"} <= set(keys)


def test_a_default_of_the_program_is_written_or_named_where_it_differs(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {}))
    given = {"num_repeats", "class_tokens", "image_dir"}
    left_out = {
        each.key for each in draft.decisions if each.outcome == "not translated" and each.key not in given
    }
    assert left_out == set()


def test_a_secret_is_not_shown(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"wandb_api_key": "abcdef0123", "huggingface_token": "hf_zzz"}))
    assert "abcdef0123" not in str(draft.decisions)
    assert "hf_zzz" not in str(draft.decisions)


# Folders and captions.


def test_a_folder_with_a_number_is_repeated_that_often_in_all(dog: Path) -> None:
    images(dog / "1_cat", 2)
    images(dog / "without number", 2)
    entries = migrate(kohya(dog, NETWORK, {})).datasets
    assert [(each["id"], each["repeats"]) for each in entries] == [("10_sks dog", 9), ("1_cat", 0)]


@pytest.mark.parametrize(
    ("caption", "extension", "strategy", "prompt"),
    [
        ("a dog", ".txt", "textfile", None),
        (None, ".txt", "instanceprompt", "sks dog"),
        ("a dog", ".caption", "instanceprompt", "sks dog"),
        ("a dog", ".tags", "instanceprompt", "sks dog"),
    ],
    ids=["captions", "none", "of another suffix", "of a suffix that is not read"],
)
def test_images_without_caption_take_the_class_tokens(
    tmp_path: Path, caption: str | None, extension: str, strategy: str, prompt: str | None
) -> None:
    images(tmp_path / "10_sks dog", 2, caption=caption)
    entry = migrate(kohya(tmp_path, NETWORK, {"caption_extension": extension})).datasets[0]
    assert (entry["caption_strategy"], entry.get("instance_prompt")) == (strategy, prompt)


def test_missing_captions_among_others_are_counted(tmp_path: Path) -> None:
    images(images(tmp_path / "10_sks dog", 2, caption="a dog"), 3)
    draft = migrate(kohya(tmp_path, NETWORK, {}))
    found = decision(draft, "caption_extension")
    assert found.outcome == "approximate"
    assert "3" in found.text
    assert "sks dog" in found.text


@pytest.mark.parametrize(("wildcard", "lines"), [(True, "choose"), (None, "first")])
def test_only_the_first_line_counts_without_wildcards(dog: Path, wildcard: object, lines: str) -> None:
    assert migrate(kohya(dog, NETWORK, {"enable_wildcard": wildcard})).datasets[0]["caption_lines"] == lines


def test_a_prefix_and_a_suffix_stand_around_the_captions(dog: Path) -> None:
    options = {"caption_prefix": "masterpiece,", "caption_suffix": ", best"}
    entry = migrate(kohya(dog, NETWORK, options)).datasets[0]
    assert (entry["caption_prefix"], entry["caption_suffix"]) == ("masterpiece,", ", best")
    assert "instance_prompt" not in entry


def _tagged(dog: Path, *captions: str) -> None:
    for number, caption in enumerate(captions):
        (dog / "10_sks dog" / f"image{number}.txt").write_text(f"{caption}\na second line, of, tags")


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (
            {"shuffle_caption": True, "keep_tokens": 1},
            {"caption_shuffle": {"enable": True, "count": 4, "include_original": False, "position_start": 1}},
        ),
        (
            {"caption_tag_dropout_rate": 0.1, "keep_tokens": 2},
            {
                "caption_tag_dropout_rate": 0.1,
                "caption_shuffle": {"enable": False, "position_start": 2},
            },
        ),
        (
            {"shuffle_caption": True, "keep_tokens_separator": "|||", "caption_separator": " "},
            {
                "caption_shuffle": {
                    "enable": True,
                    "count": 4,
                    "include_original": False,
                    "split_on": "space",
                    "keep_separator": "|||",
                }
            },
        ),
    ],
    ids=["shuffle", "dropout", "separators"],
)
def test_tags_are_shuffled_and_dropped(
    dog: Path, options: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    _tagged(dog, "a dog, b, c", "d", "e")
    draft = migrate(kohya(dog, NETWORK, options))
    entry = draft.datasets[0]
    assert {
        key: value for key, value in entry.items() if key.startswith(("caption_shuffle", "caption_tag"))
    } == ours
    for key in options:
        drawn = key in ("shuffle_caption", "caption_tag_dropout_rate")
        assert decision(draft, key).outcome == ("approximate" if drawn else "translated")


@pytest.mark.parametrize(
    ("captions", "options", "outcome"),
    [
        (("a dog", "d", "e"), {}, "no effect"),
        (("a, b", "d", "e"), {"keep_tokens": 2}, "no effect"),
        (("a, b, c", "d", "e"), {"keep_tokens": 2}, "approximate"),
        (("a dog", "d", "e"), {"caption_prefix": "sks,"}, "approximate"),
        (("a; b", "d", "e"), {"caption_separator": ";"}, "not translated"),
        (("a ||| b, c", "d", "e"), {"keep_tokens_separator": "|||"}, "approximate"),
        (("a, c ||| b", "d", "e"), {"keep_tokens_separator": "|||"}, "no effect"),
    ],
)
def test_tags_that_no_caption_has_are_not_shuffled(
    dog: Path, captions: tuple[str, ...], options: dict[str, object], outcome: str
) -> None:
    _tagged(dog, *captions)
    draft = migrate(kohya(dog, NETWORK, {"shuffle_caption": True, **options}))
    assert decision(draft, "shuffle_caption").outcome == outcome
    assert ("caption_shuffle" in draft.datasets[0]) is (outcome == "approximate")


def test_wildcards_are_drawn(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"enable_wildcard": True}))
    assert draft.datasets[0]["enable_wildcard"] is True
    assert decision(draft, "enable_wildcard").outcome == "approximate"
    assert "enable_wildcard" not in migrate(kohya(dog, NETWORK, {})).datasets[0]


@pytest.mark.parametrize(("theirs", "ours"), [(150, 150), ("225", 225), (75, None), (None, None)])
def test_captions_of_several_chunks_stay_whole(dog: Path, theirs: object, ours: int | None) -> None:
    draft = migrate(kohya(dog, NETWORK, {"max_token_length": theirs}))
    assert draft.config.get("max_token_length") == ours
    if ours:
        assert decision(draft, "max_token_length").outcome == "approximate"


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (
            {"resolution": "1024,1024"},
            {"resolution": 1024, "crop": True, "crop_aspect": "square", "crop_style": "center"},
        ),
        ({"resolution": 512, "enable_bucket": True}, {"resolution": 512, "crop": False}),
        ({"resolution": "768,1024", "enable_bucket": True}, {"resolution": round(math.sqrt(768 * 1024), 2)}),
        ({"resolution": 512, "random_crop": True}, {"crop_style": "random", "crop_aspect": "square"}),
        (
            {"resolution": 512, "enable_bucket": True, "random_crop": True},
            {"crop": True, "crop_aspect": "preserve"},
        ),
    ],
    ids=["square", "buckets", "area", "random", "random in buckets"],
)
def test_resolution_and_buckets_become_a_crop(
    dog: Path, options: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    entry = migrate(kohya(dog, NETWORK, options)).datasets[0]
    assert {key: entry[key] for key in ours} == ours


def test_folders_that_are_not_here_are_named(tmp_path: Path) -> None:
    draft = migrate(kohya(tmp_path / "elsewhere", NETWORK, {"max_train_epochs": 3, "save_every_n_epochs": 1}))
    assert draft.config["num_train_epochs"] == 3
    assert "max_train_steps" not in draft.config
    assert any("elsewhere" in each for each in draft.to_do)
    intervals = {key: value for key, value in draft.config.items() if key.startswith("checkpoint_")}
    assert intervals == {"checkpoint_epoch_interval": 1, "checkpoint_step_interval": 0}


def test_a_windows_path_is_written_with_slashes(dog: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"pretrained_model_name_or_path": r"C:\models\xl.safetensors"}))
    assert draft.config["pretrained_model_name_or_path"] == "C:/models/xl.safetensors"


# Length of the run: kohya's arithmetic, written here again from its description.


def _kohyas_steps(
    numbers: Iterable[tuple[int, int]], *, batch: int, epochs: int, accumulation: int, processes: int = 1
) -> int:
    """Steps of buckets (images, repeats): each has whole batches and a rest."""
    batches = sum((images * repeats + batch - 1) // batch for images, repeats in numbers)
    per_process = (batches + processes - 1) // processes
    return epochs * ((per_process + accumulation - 1) // accumulation)


@pytest.mark.parametrize(
    ("batch", "epochs", "accumulation"), [(1, 2, 1), (4, 3, 1), (4, 3, 4), (2, 5, 3)], ids=str
)
def test_epochs_become_kohyas_number_of_steps(dog: Path, batch: int, epochs: int, accumulation: int) -> None:
    images(dog / "10_sks dog", 2, size=(128, 64), caption="a wide dog")
    images(dog / "3_cat", 4)
    options = {
        "train_batch_size": batch,
        "max_train_epochs": epochs,
        "gradient_accumulation_steps": accumulation,
        "enable_bucket": True,
        "resolution": "512,512",
        "save_every_n_epochs": 1,
    }
    draft = migrate(kohya(dog, NETWORK, options))
    # The square images of both folders share a bucket; the wide ones have their own.
    square = 3 * 10 + 4 * 3
    steps = _kohyas_steps([(square, 1), (2, 10)], batch=batch, epochs=epochs, accumulation=accumulation)
    assert draft.config["max_train_steps"] == steps
    assert draft.config["checkpoint_step_interval"] == steps // epochs
    assert draft.length is not None
    assert draft.length.samples == epochs * (square + 20)


def test_the_processes_of_the_launcher_share_the_batches(dog: Path) -> None:
    command = kohya(dog, NETWORK, {"max_train_epochs": 2}).replace("launch", "launch --num_processes 4")
    assert migrate(command).config["max_train_steps"] == 2 * math.ceil(30 / 4)


@pytest.mark.parametrize(("num_images", "steps"), [(4, 60), (50, 60)])
def test_regularisation_images_are_drawn_as_often_as_the_others(
    dog: Path, tmp_path: Path, num_images: int, steps: int
) -> None:
    images(tmp_path / "reg" / "1_dog", num_images)
    options = {
        "max_train_epochs": 1,
        "reg_data_dir": (tmp_path / "reg").as_posix(),
        "prior_loss_weight": 0.5,
    }
    draft = migrate(kohya(dog, NETWORK, options))
    assert [bool(each.get("is_regularisation_data")) for each in draft.datasets] == [False, True]
    assert draft.datasets[1]["instance_prompt"] == "dog"
    assert draft.config["regularisation_target"] == "data"
    assert draft.config["prior_loss_weight"] == 0.5
    assert draft.config["max_train_steps"] == steps


# Flux.1.


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"timestep_sampling": "sigma"}, {"flow_use_uniform_schedule": True, "flow_schedule_shift": 3}),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 3.1582}, {"flow_schedule_shift": 3.1582}),
        (
            {"timestep_sampling": "sigmoid", "sigmoid_scale": 2},
            {"flow_schedule_shift": 0, "flow_sigmoid_scale": 2},
        ),
        ({"timestep_sampling": "uniform"}, {"flow_use_uniform_schedule": True, "flow_schedule_shift": 0}),
        (
            {
                "timestep_sampling": "sigma",
                "weighting_scheme": "logit_normal",
                "logit_mean": 0.5,
                "logit_std": 2,
            },
            # The scripts count timesteps from noise down.
            {"flow_sigmoid_mean": -0.5, "flow_sigmoid_scale": 2, "flow_use_uniform_schedule": None},
        ),
        (
            {"weighting_scheme": "mode", "mode_scale": 1.1},
            {"flow_use_mode_schedule": True, "flow_mode_schedule_scale": 1.1, "flow_schedule_shift": 3},
        ),
        ({"weighting_scheme": "cosmap"}, {"flow_use_uniform_schedule": True}),
        ({"timestep_sampling": "shift", "weighting_scheme": "mode"}, {"flow_use_mode_schedule": None}),
        ({"ip_noise_gamma": 0.1}, {"input_perturbation": 0.1}),
        ({"noise_offset": 0.1, "min_timestep": 9}, {"noise_offset": None, "min_timestep": None}),
        ({"timestep_sampling": "flux_shift"}, {"flow_schedule_auto_shift": True}),
        ({}, {"flux_guidance_value": 3.5}),
        ({"guidance_scale": 1}, {"flux_guidance_value": 1}),
        ({"apply_t5_attn_mask": True}, {"flux_attention_masked_training": True}),
        ({"blocks_to_swap": 18}, {"enable_group_offload": True, "gradient_checkpointing": True}),
        ({"torch_compile": True}, {"dynamo_backend": "inductor"}),
        ({"torch_compile": True, "blocks_to_swap": 18}, {"dynamo_backend": "no"}),
        ({"min_snr_gamma": 5}, {"snr_gamma": None}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_of_flux_becomes_ours(
    dog: Path, options: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    options = {"network_module": "networks.lora_flux", **options}
    config = migrate(kohya(dog, "flux_train_network", options)).config
    assert config["model_family"] == "flux"
    assert {key: config.get(key) for key in ours} == ours


def test_what_group_offloading_needs_is_said_where_it_is_decided(dog: Path) -> None:
    found = decision(
        migrate(kohya(dog, "flux_train_network", {"blocks_to_swap": 18})), "gradient_checkpointing"
    )
    assert (found.outcome, found.ours) == ("approximate", "gradient_checkpointing: true")


@pytest.mark.parametrize(
    ("file", "flavour", "guided"),
    [("flux1-dev.safetensors", "dev", True), ("flux1-schnell.safetensors", "schnell", False)],
)
def test_a_flux_checkpoint_is_the_transformer_of_its_flavour(
    dog: Path, file: str, flavour: str, guided: bool
) -> None:
    options = {"pretrained_model_name_or_path": file, "ae": "ae.safetensors", "clip_l": "c.safetensors"}
    config = migrate(kohya(dog, "flux_train_network", options)).config
    assert config["pretrained_transformer_model_name_or_path"] == file
    assert config["pretrained_vae_model_name_or_path"] == "ae.safetensors"
    assert config["model_flavour"] == flavour
    assert ("flux_guidance_value" in config) is guided


@pytest.mark.parametrize(("kind", "outcome"), [("raw", "translated"), (None, "not translated")])
def test_another_target_of_the_loss_is_named(dog: Path, kind: str | None, outcome: str) -> None:
    draft = migrate(kohya(dog, "flux_train_network", {"model_prediction_type": kind}))
    assert decision(draft, "model_prediction_type").outcome == outcome


def test_a_single_kind_of_block_is_a_target_of_lycoris(dog: Path) -> None:
    options = {"network_module": "networks.lora_flux", "network_args": ["train_blocks=single"]}
    draft = migrate(kohya(dog, "flux_train_network", options))
    assert draft.lycoris is not None
    assert draft.lycoris["apply_preset"] == {"target_module": ["FluxSingleTransformerBlock"]}


@pytest.mark.parametrize(("split", "outcome"), [("True", "translated"), ("False", "approximate")])
def test_layers_that_kohya_joins_have_a_lora_each(dog: Path, split: str, outcome: str) -> None:
    options = {"network_module": "networks.lora_flux", "network_args": [f"split_qkv={split}"]}
    draft = migrate(kohya(dog, "flux_train_network", options))
    assert decision(draft, "network_module").outcome == outcome


# Sample prompts.


def test_sample_prompts_become_a_library_with_the_settings_of_the_first(dog: Path, tmp_path: Path) -> None:
    text = "# comment\na cat --w 832 --h 1216 --d 7 --l 6.5 --s 28 --n blurry, low\na dog --w 64 --h 64\n"
    file = toml(tmp_path / "prompts.txt", text)
    options = {"sample_prompts": file.as_posix(), "sample_every_n_steps": 50, "sample_sampler": "euler_a"}
    draft = migrate(kohya(dog, NETWORK, options))
    assert list(draft.prompts.values()) == ["a cat", "a dog"]
    ours = {
        "validation_resolution": "832x1216",
        "validation_seed": 7,
        "validation_guidance": 6.5,
        "validation_num_inference_steps": 28,
        "validation_negative_prompt": "blurry, low",
        "validation_step_interval": 50,
        "validation_noise_scheduler": "euler-a",
    }
    assert {key: draft.config[key] for key in ours} == ours
    assert decision(draft, "sample_prompts").outcome == "approximate"


def test_a_single_prompt_stands_in_the_configuration(dog: Path, tmp_path: Path) -> None:
    file = toml(tmp_path / "prompts.txt", "a cat --w 64\n")
    draft = migrate(
        kohya(
            dog,
            NETWORK,
            {"sample_prompts": file.as_posix(), "sample_every_n_epochs": 2, "max_train_epochs": 4},
        )
    )
    assert draft.config["validation_prompt"] == "a cat"
    assert draft.config["validation_step_interval"] == 2 * 30


# Toml files.


def test_a_toml_of_a_run_is_read_by_its_sections(dog: Path, tmp_path: Path) -> None:
    text = f"""
    [model]
    pretrained_model_name_or_path = 'models/sdxl_base.safetensors'
    [network]
    network_module = 'networks.lora'
    network_dim = 8
    [data]
    train_data_dir = '{dog.as_posix()}'
    resolution = '64,64'
    """
    draft = migrate(toml(tmp_path / "run.toml", text))
    assert (draft.config["model_family"], draft.config["lora_rank"]) == ("sdxl", 8)


def test_the_command_counts_before_its_config_file(dog: Path, tmp_path: Path) -> None:
    file = toml(tmp_path / "run.toml", "network_dim = 8\nnetwork_alpha = 4\n")
    options = {"config_file": file.as_posix(), "network_dim": 16}
    config = migrate(kohya(dog, NETWORK, options)).config
    assert (config["lora_rank"], config["lora_alpha"]) == (16, 4)


def _with_datasets(folder: Path, text: str, **options: object) -> str:
    file = toml(folder / "data.toml", text)
    given = {
        "pretrained_model_name_or_path": "a/b",
        "dataset_config": file.as_posix(),
        "network_module": "networks.lora",
        **options,
    }
    return f"python sdxl_train_network.py {arguments(given)}"


def test_a_subset_takes_what_it_lacks_from_the_levels_above(dog: Path, tmp_path: Path) -> None:
    folder = (dog / "10_sks dog").as_posix()
    text = f"""
    [general]
    caption_extension = '.txt'
    num_repeats = 4
    [[datasets]]
    resolution = 512
    batch_size = 3
    enable_bucket = true
      [[datasets.subsets]]
      image_dir = '{folder}'
      [[datasets.subsets]]
      image_dir = '{folder}'
      num_repeats = 2
    [[datasets]]
    resolution = [768, 768]
    batch_size = 3
      [[datasets.subsets]]
      image_dir = '{folder}'
      class_tokens = 'sks dog'
    """
    draft = migrate(_with_datasets(tmp_path, text, max_train_epochs=1))
    found = [(each["resolution"], each["repeats"], each["crop"]) for each in draft.datasets]
    assert found == [(512, 3, False), (512, 1, False), (768, 3, True)]
    assert draft.config["train_batch_size"] == 3
    # Three images: 4 + 2 times in the buckets of the first dataset, 4 times in those of the second.
    assert draft.config["max_train_steps"] == 6 + 4
    assert decision(draft, "datasets[0].subsets[1].num_repeats").ours == "repeats: 1"
    assert decision(draft, "general.caption_extension").outcome == "translated"


def test_datasets_keep_their_batch_sizes(dog: Path, tmp_path: Path) -> None:
    folder = (dog / "10_sks dog").as_posix()
    text = "".join(
        f"""
    [[datasets]]
    resolution = 512
    batch_size = {size}
      [[datasets.subsets]]
      image_dir = '{folder}'
      class_tokens = 'sks dog'
    """
        for size in (3, 1, 3)
    )
    draft = migrate(_with_datasets(tmp_path, text, max_train_epochs=1))
    assert draft.config["train_batch_size"] == 3
    assert [each.get("train_batch_size") for each in draft.datasets] == [None, 1, None]
    found = [decision(draft, f"datasets[{place}].batch_size") for place in range(3)]
    assert [(each.outcome, each.ours) for each in found] == [
        ("translated", f"train_batch_size: {size}") for size in (3, 1, 3)
    ]


def test_regularisation_subsets_keep_their_kind(dog: Path, tmp_path: Path) -> None:
    folder = (dog / "10_sks dog").as_posix()
    text = f"""
    [[datasets]]
    resolution = 64
      [[datasets.subsets]]
      image_dir = '{folder}'
      [[datasets.subsets]]
      image_dir = '{folder}'
      is_reg = true
    """
    draft = migrate(_with_datasets(tmp_path, text))
    assert [bool(each.get("is_regularisation_data")) for each in draft.datasets] == [False, True]
    assert decision(draft, "datasets[0].subsets[1].is_reg").outcome == "translated"


# Bad input.


def test_a_subset_with_its_own_resolution_is_an_error(tmp_path: Path) -> None:
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir='a'\nresolution={size}\n" for size in (512, 768))
    with pytest.raises(ConfigError, match="resolution") as error:
        migrate(_with_datasets(tmp_path, f"[[datasets]]\n{subsets}"))
    assert "datasets[0].subsets[0]" in str(error.value)


@pytest.mark.parametrize(
    "script",
    ["train_network", "sd3_train_network", "sdxl_train_control_net"],
)
def test_another_kind_of_run_is_an_error_that_names_it(dog: Path, script: str) -> None:
    with pytest.raises(ConfigError, match=script):
        migrate(kohya(dog, script, {}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[[datasets]]\nresolution = 512\n", "dataset_config"),
        ("network_module = 'networks.lora'\nnetwork_dim =", "cut off"),
        ("network_dim = 8\n", "sdxl_train_network"),
        ("network_module='networks.lora_flux'\n", "pretrained_model_name_or_path"),
        ('output_dir = "C:\\models"\n', "single quotes"),
        ("title = 'x'\n", "not known"),
        ("", "empty"),
    ],
    ids=["datasets alone", "cut off", "no family", "no model", "backslash", "another file", "empty"],
)
def test_half_a_file_is_one_clear_error(tmp_path: Path, text: str, found: str) -> None:
    file = toml(tmp_path / "half.toml", text)
    with pytest.raises(ConfigError, match=found) as error:
        migrate(file)
    assert "half.toml" in str(error.value) or "sdxl_train_network" in found


def test_training_the_text_encoders_alone_is_an_error(dog: Path) -> None:
    with pytest.raises(ConfigError, match="network_train_text_encoder_only"):
        migrate(kohya(dog, NETWORK, {"network_train_text_encoder_only": True}))


@pytest.mark.parametrize(
    ("key", "value"), [("network_dim", "many"), ("train_batch_size", 1.5), ("resolution", "big")]
)
def test_a_value_that_is_no_number_is_an_error_with_its_key(dog: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        migrate(kohya(dog, NETWORK, {key: value}))


# The graphical program's json.


def test_a_preset_of_the_graphical_program_needs_no_model_and_no_images(tmp_path: Path) -> None:
    keys = {
        "LoRA_type": "LyCORIS/LoKr",
        "sdxl": True,
        "network_dim": 8,
        "network_alpha": 1,
        "conv_dim": 4,
        "conv_alpha": 1,
        "factor": 8,
        "epoch": 4,
        "lr_warmup": 10,
        "lr_scheduler": "cosine",
        "optimizer": "Prodigy",
        "learning_rate": 1.0,
        "unet_lr": 1.0,
        "text_encoder_lr": 0,
        "max_resolution": "1024,1024",
        "enable_bucket": True,
        "noise_offset": 0,
        "min_snr_gamma": 5,
        "down_lr_weight": "1,1,1",
        "additional_parameters": "",
        "unit": 4,
    }
    draft = migrate(toml(tmp_path / "preset.json", json.dumps(keys)))
    assert draft.lycoris is not None
    assert (draft.lycoris["algo"], draft.lycoris["factor"]) == ("lokr", 8)
    ours = {
        "num_train_epochs": 4,
        "optimizer": "prodigy",
        "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "snr_gamma": 5,
    }
    assert {key: draft.config[key] for key in ours} == ours
    assert draft.datasets[0]["resolution"] == 1024
    assert any("instance_data_dir" in each for each in draft.to_do)
    outcomes = {
        "network_train_unet_only": "translated",
        "factor": "translated",
        "epoch": "translated",
        "down_lr_weight": "not translated",
        "additional_parameters": "no effect",
        "unit": "no effect",
    }
    assert {key: decision(draft, key).outcome for key in outcomes} == outcomes
    renamed = {"optimizer": "optimizer_type", "max_resolution": "resolution"}
    assert {renamed.get(key, key) for key in keys} <= {each.key for each in draft.decisions}


def test_alpha_masks_are_those_of_the_subset_that_has_them(dog: Path, tmp_path: Path) -> None:
    folder = (dog / "10_sks dog").as_posix()
    text = f"""
      [[datasets]]
      resolution = 512
      [[datasets.subsets]]
      image_dir = '{folder}'
      alpha_mask = true
      [[datasets.subsets]]
      image_dir = '{folder}'
      alpha_mask = false
    """
    draft = migrate(_with_datasets(tmp_path, text))
    assert [entry.get("alpha_mask", False) for entry in draft.datasets] == [True, False]
    assert decision(draft, "datasets[0].subsets[0].alpha_mask").outcome == "same"
    assert decision(draft, "datasets[0].subsets[1].alpha_mask").outcome == "no effect"


def test_alpha_masks_of_the_command_are_those_of_every_folder(dog: Path, tmp_path: Path) -> None:
    draft = migrate(kohya(dog, NETWORK, {"alpha_mask": True}))
    assert [entry["alpha_mask"] for entry in draft.datasets] == [True]
