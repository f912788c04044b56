"""OneTrainer: what each kind of setting becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.reading import flattened
from simpletuner.helpers.errors import ConfigError
from tests.unit.configuration.migration.foreign_files import decision, images, migrate, one_trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "dog", 7, caption="a dog, b, c, d")


def _concept(folder: Path, **keys: object) -> dict[str, object]:
    return {"path": folder.as_posix(), **keys}


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"lora_rank": 8, "lora_alpha": 4.0}, {"lora_rank": 8, "lora_alpha": 4}),
        ({}, {"lora_rank": 16, "lora_alpha": 1, "max_grad_norm": 1.0, "mixed_precision": "fp16"}),
        ({"lora_decompose": True}, {"use_dora": True}),
        ({"train_dtype": "BFLOAT_16"}, {"mixed_precision": "bf16"}),
        ({"unet": {"weight_dtype": "INT_8"}}, {"base_model_precision": "int8-torchao"}),
        ({"unet": {"weight_dtype": "FLOAT_16"}}, {"base_model_precision": None}),
        (
            {"text_encoder_2": {"train": False, "weight_dtype": "NFLOAT_4"}},
            {"text_encoder_2_precision": "nf4-bnb"},
        ),
        ({"layer_offload_fraction": 0.5}, {"enable_group_offload": True, "group_offload_type": "leaf_level"}),
        ({"compile": True}, {"dynamo_backend": "inductor"}),
        ({"compile": False}, {"dynamo_backend": None}),
        ({"gradient_checkpointing": "OFF"}, {"gradient_checkpointing": False}),
        ({"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0}, {"snr_gamma": 5.0}),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, {"debiased_estimation_loss": True}),
        (
            {"offset_noise_weight": 0.05},
            {"offset_noise": True, "noise_offset": 0.05, "noise_offset_probability": 1.0},
        ),
        (
            {"min_noising_strength": 0.1, "max_noising_strength": 0.9},
            {"min_timestep": 100, "max_timestep": 900},
        ),
        ({"min_noising_strength": 0.0, "max_noising_strength": 1.0}, {"max_timestep": None}),
        ({"force_v_prediction": True}, {"prediction_type": "v_prediction"}),
        ({"learning_rate_scheduler": "COSINE"}, {"lr_scheduler": "cosine", "lr_warmup_steps": 200}),
        ({"learning_rate_warmup_steps": 0.25, "epochs": 4}, {"lr_warmup_steps": 7}),
        ({"learning_rate_warmup_steps": 20, "gradient_accumulation_steps": 4}, {"lr_warmup_steps": 5}),
        ({"learning_rate": 1e-4, "learning_rate_min_factor": 0.5}, {"lr_end": 5e-5}),
        ({"learning_rate": 1e-4, "batch_size": 4, "learning_rate_scaler": "BATCH"}, {"learning_rate": 2e-4}),
        (
            {"optimizer": {"optimizer": "ADAMW", "weight_decay": 0.1, "beta2": 0.99, "fused": True}},
            {"optimizer": "adamw", "optimizer_config": {"weight_decay": 0.1, "beta2": 0.99}},
        ),
        ({"save_every": 2, "save_every_unit": "EPOCH"}, {"checkpoint_step_interval": 14}),
        ({"save_every": 50, "save_every_unit": "STEP"}, {"checkpoint_step_interval": 50}),
        (
            {"output_model_destination": "models/dog.safetensors"},
            {"output_dir": "models/dog", "lora_format": "comfyui"},
        ),
        ({"output_model_format": "DIFFUSERS_LORA"}, {"lora_format": None}),
        ({"tensorboard": False}, {"report_to": "none"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_becomes_ours(
    folder: Path, tmp_path: Path, keys: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    config = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **keys)).config
    assert {key: config.get(key) for key in ours} == ours


# 7 images of one size. The rest of a bucket is left out, and the rest of the last step too.
@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs", "balancing", "steps"),
    [(1, 1, 2, 1.0, 14), (2, 1, 3, 1.0, 9), (4, 1, 3, 2.0, 9), (2, 4, 3, 1.0, 2), (1, 1, 1, 0.5, 3)],
)
def test_epochs_become_one_trainers_number_of_steps(
    folder: Path, tmp_path: Path, batch: int, accumulation: int, epochs: int, balancing: float, steps: int
) -> None:
    keys = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "epochs": epochs}
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder, balancing=balancing)], **keys))
    draws = int(7 * balancing)
    assert steps == epochs * (draws // batch) // accumulation, "the numbers of this test"
    assert draft.config["max_train_steps"] == steps
    assert draft.length is not None
    assert draft.length.samples == steps * batch * accumulation


# Six square images and three wide ones, in buckets of their own: 1 + 0 whole batches of 4, or 3 of 3.
@pytest.mark.parametrize(("batch", "bucketing", "steps"), [(4, True, 1), (3, True, 3), (4, False, 2)])
def test_the_rest_of_each_bucket_is_left_out(tmp_path: Path, batch: int, bucketing: bool, steps: int) -> None:
    folder = images(images(tmp_path / "dog", 6), 3, size=(256, 64))
    keys = {"batch_size": batch, "epochs": 1, "aspect_ratio_bucketing": bucketing, "resolution": "512"}
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **keys))
    assert draft.config["max_train_steps"] == steps


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"balancing": 3.0}, {"repeats": 2}),
        ({"balancing": 0.5}, {"probability": 0.5}),
        ({"balancing": 14, "balancing_strategy": "SAMPLES"}, {"repeats": 1}),
        ({"balancing": 3, "balancing_strategy": "SAMPLES"}, {"probability": 0.428571}),
        ({"name": "my dog"}, {"id": "my dog"}),
        ({"text": {"prompt_source": "filename"}}, {"caption_strategy": "filename"}),
        ({"text": {"prompt_source": "sample"}}, {"caption_strategy": "textfile", "caption_lines": "choose"}),
        (
            {"text": {"enable_tag_shuffling": True, "keep_tags_count": 2}},
            {"caption_shuffle": {"enable": True, "count": 4, "include_original": False, "position_start": 2}},
        ),
        (
            {
                "text": {
                    "tag_dropout_enable": True,
                    "tag_dropout_mode": "RANDOM",
                    "tag_dropout_probability": 0.2,
                    "tag_delimiter": " ",
                }
            },
            {
                "caption_tag_dropout_rate": 0.2,
                "caption_shuffle": {"enable": False, "split_on": "space", "position_start": 1},
            },
        ),
        ({"text": {"tag_dropout_probability": 0.2}}, {"caption_tag_dropout_rate": None}),
        ({"image": {"enable_crop_jitter": False}}, {"crop": False}),
        ({}, {"crop": True, "crop_aspect": "preserve", "crop_style": "random", "resolution": 64}),
        ({"image": {"enable_resolution_override": True, "resolution_override": "96"}}, {"resolution": 96}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_concept_becomes_a_dataset(
    folder: Path, tmp_path: Path, keys: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    entry = migrate(one_trainer(tmp_path / "run.json", [_concept(folder, **keys)])).datasets[0]
    assert {key: entry.get(key) for key in ours} == ours


def test_a_prompt_file_of_one_line_is_the_instance_prompt(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a photo of sks dog\n")
    text = {"prompt_source": "concept", "prompt_path": str(tmp_path / "prompt.txt")}
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder, text=text)]))
    assert draft.datasets[0]["instance_prompt"] == "a photo of sks dog"
    assert decision(draft, "concepts[0].text.prompt_path").outcome == "translated"


def test_several_resolutions_share_the_draws(folder: Path, tmp_path: Path) -> None:
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], resolution="64,96"))
    assert [(each["resolution"], each["probability"]) for each in draft.datasets] == [(64, 0.5), (96, 0.5)]


def test_a_concept_of_prior_prediction_keeps_to_the_base(folder: Path, tmp_path: Path) -> None:
    concepts = [_concept(folder), _concept(folder, type="PRIOR_PREDICTION")]
    draft = migrate(one_trainer(tmp_path / "a.json", concepts))
    assert [bool(each.get("is_regularisation_data")) for each in draft.datasets] == [False, True]
    assert draft.config.get("regularisation_target", "base") == "base"
    with pytest.raises(ConfigError):
        migrate(one_trainer(tmp_path / "b.json", concepts[1:]))


def test_concepts_and_samples_are_read_from_their_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps([_concept(folder), _concept(folder, enabled=False)]))
    sample = {"prompt": "a dog", "width": 64, "height": 96, "seed": 3, "diffusion_steps": 9, "cfg_scale": 6.0}
    (tmp_path / "samples.json").write_text(json.dumps([sample, {"prompt": "no", "enabled": False}]))
    file = one_trainer(
        tmp_path / "run.json",
        [],
        concept_file_name="concepts.json",
        sample_definition_file_name="samples.json",
        sample_after=1,
        sample_after_unit="EPOCH",
    )
    draft = migrate(file)
    assert len(draft.datasets) == 1
    ours = {
        "validation_prompt": "a dog",
        "validation_resolution": "64x96",
        "validation_seed": 3,
        "validation_num_inference_steps": 9,
        "validation_guidance": 6.0,
        "validation_step_interval": 7,
    }
    assert {key: draft.config[key] for key in ours} == ours


def test_a_preset_without_concepts_names_what_is_missing(tmp_path: Path) -> None:
    draft = migrate(one_trainer(tmp_path / "preset.json", [], epochs=5))
    assert draft.config["num_train_epochs"] == 5
    assert len(draft.datasets) == 1
    assert any("instance_data_dir" in each for each in draft.to_do)
    assert not any(each.key.startswith("concepts[") for each in draft.decisions)


def test_every_key_of_a_run_is_decided_once(folder: Path, tmp_path: Path) -> None:
    file = one_trainer(
        tmp_path / "run.json",
        [_concept(folder, image={"enable_random_flip": True, "odd": 1}, loss_weight=2.0)],
        unet={"weight_dtype": "FLOAT_16", "stop_training_after": 3},
        optimizer={"optimizer": "ADAMW_8BIT", "weight_decay": 0.1, "fused": False},
        ema="GPU",
        odd=1,
        cloud={"enabled": False},
    )
    keys = [each.key for each in migrate(file).decisions]
    content = json.loads(file.read_text())
    concept = dict(flattened(content.pop("concepts")[0]))
    given = {"cloud", *(key for key, _ in flattened(content) if not key.startswith("cloud."))}
    given |= {f"concepts[0].{key}" for key in concept}
    assert len(keys) == len(set(keys))
    assert given <= set(keys)


@pytest.mark.parametrize(
    ("filters", "names", "target"),
    [
        ({"layer_filter": "attentions"}, True, None),
        ({"layer_filter_preset": "full"}, False, [".*"]),
        ({"layer_filter": "attn1,ff.net"}, False, [".*attn1.*", r".*ff\.net.*"]),
        ({"layer_filter": "^down", "layer_filter_regex": True}, False, [".*^down.*"]),
    ],
    ids=["preset", "all", "parts of names", "regular expression"],
)
def test_a_layer_filter_becomes_targets(
    folder: Path, tmp_path: Path, filters: dict[str, object], names: bool, target: list[str] | None
) -> None:
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **filters))
    assert ("peft_lora_target_modules" in draft.config) is names
    assert (draft.lycoris or {"apply_preset": {"target_name": None}})["apply_preset"] == {
        "target_name": target
    }


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        (
            {"timestep_distribution": "LOGIT_NORMAL", "dynamic_timestep_shifting": True},
            {"flow_sigmoid_scale": 1, "flow_schedule_auto_shift": True},
        ),
        (
            {"timestep_distribution": "UNIFORM", "timestep_shift": 3.0},
            {"flow_use_uniform_schedule": True, "flow_schedule_shift": 3},
        ),
        (
            {"timestep_distribution": "BETA", "noising_weight": 2.0, "noising_bias": 3.0},
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 2.0, "flow_beta_schedule_beta": 3.0},
        ),
        (
            {"timestep_distribution": "LOGIT_NORMAL", "noising_weight": 1.0, "noising_bias": -0.5},
            {"flow_sigmoid_scale": 2, "flow_sigmoid_mean": -0.5},
        ),
        (
            {"timestep_distribution": "HEAVY_TAIL", "noising_weight": 1.5},
            {"flow_use_mode_schedule": True, "flow_mode_schedule_scale": 1.5},
        ),
        ({"offset_noise_weight": 0.1}, {"offset_noise": None}),
        ({"transformer": {"guidance_scale": 1.0}}, {"flux_guidance_value": 1.0}),
    ],
    ids=["normal", "uniform", "beta", "mean", "heavy tail", "offset", "guidance"],
)
def test_noise_levels_of_flow_matching_become_ours(
    folder: Path, tmp_path: Path, keys: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    file = one_trainer(
        tmp_path / "run.json",
        [_concept(folder)],
        model_type="FLUX_DEV_1",
        base_model_name="black-forest-labs/FLUX.1-dev",
        **keys,
    )
    config = migrate(file).config
    assert {key: config.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"training_method": "EMBEDDING"}, "EMBEDDING"),
        ({"model_type": "STABLE_DIFFUSION_15"}, "STABLE_DIFFUSION_15"),
        ({"model_type": "FLUX_FILL_DEV_1"}, "inpainting"),
        ({"peft_type": "OFT_2"}, "OFT_2"),
        ({"unet": {"train": False}}, "unet.train"),
        ({"resolution": "big"}, "resolution"),
    ],
)
def test_another_kind_of_run_is_an_error(
    folder: Path, tmp_path: Path, keys: dict[str, object], found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **keys))


def test_four_bits_give_way_to_eight_where_layers_move(folder: Path, tmp_path: Path) -> None:
    part = {"weight_dtype": "NFLOAT_4", "offload_fraction": 0.5}
    file = one_trainer(
        tmp_path / "run.json",
        [_concept(folder)],
        model_type="FLUX_DEV_1",
        base_model_name="black-forest-labs/FLUX.1-dev",
        transformer=part,
        peft_type="LOKR",
    )
    draft = migrate(file)
    assert draft.config["base_model_precision"] == "int8-torchao"
    assert draft.lycoris is not None
    assert draft.lycoris["bypass_mode"] is True
    assert decision(draft, "transformer.weight_dtype").ours == 'base_model_precision: "int8-torchao"'


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"ema": "OFF", "ema_decay": 0.9, "ema_update_step_interval": 2, "non_ema_sampling": True}, {}),
        (
            {"ema": "GPU", "ema_decay": 0.99, "ema_update_step_interval": 2, "non_ema_sampling": False},
            {
                "use_ema": True,
                "ema_adapter_file": "main",
                "ema_validation": "ema_only",
                "ema_device": "accelerator",
                "ema_decay": 0.99,
                "ema_update_interval": 2,
            },
        ),
        (
            {"ema": "CPU"},
            {
                "use_ema": True,
                "ema_adapter_file": "main",
                "ema_validation": "comparison",
                "ema_decay": 0.999,
                "ema_update_interval": 5,
            },
        ),
        ({"ema": "CPU", "optimizer": {"optimizer": "SCHEDULE_FREE_ADAMW"}, "ema_decay": 0.99}, {}),
    ],
    ids=["off", "GPU", "defaults", "schedule-free"],
)
def test_the_average_is_the_adapter_as_there(
    folder: Path, tmp_path: Path, keys: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **keys))
    assert {key: value for key, value in draft.config.items() if "ema" in key.split("_")} == ours
    outcomes = {decision(draft, key).outcome for key in keys if "ema" in key.split("_")}
    expected = {"same", "translated", "approximate"} if ours else {"no effect", "not translated"}
    assert outcomes <= expected


@pytest.mark.parametrize("key", ["masked_training", "perturbation_noise_weight", "text_encoder.model_name"])
def test_what_is_left_out_is_named(folder: Path, tmp_path: Path, key: str) -> None:
    keys = {"text_encoder": {"train": False, "model_name": "x"}} if "." in key else {key: True}
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **keys))
    assert decision(draft, key).outcome == "not translated"


def test_tags_that_are_dropped_in_another_way_are_named(folder: Path, tmp_path: Path) -> None:
    text = {"tag_dropout_enable": True, "tag_dropout_mode": "FULL", "tag_dropout_probability": 0.5}
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder, text=text)]))
    assert "caption_tag_dropout_rate" not in draft.datasets[0]
    assert decision(draft, "concepts[0].text.tag_dropout_enable").outcome == "not translated"
    assert decision(draft, "concepts[0].text.tag_dropout_probability").outcome == "no effect"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"text_encoder": {"train": False}, "text_encoder_2": {"train": False}}, {}),
        (
            {"text_encoder": {"train": True, "learning_rate": 1e-5}, "text_encoder_2": {"train": False}},
            {"train_text_encoder": True, "text_encoder_lr": [1e-5, 0.0]},
        ),
        (
            {
                name: {
                    "train": True,
                    "learning_rate": 2e-5,
                    "stop_training_after": 30,
                    "stop_training_after_unit": "STEP",
                }
                for name in ("text_encoder", "text_encoder_2")
            },
            {"train_text_encoder": True, "text_encoder_lr": [2e-5], "stop_text_encoder_training": 30},
        ),
    ],
    ids=["none", "first", "both to a step"],
)
def test_trained_text_encoders_keep_rates_and_end(
    folder: Path, tmp_path: Path, parts: dict[str, object], expected: dict[str, object]
) -> None:
    draft = migrate(one_trainer(tmp_path / "run.json", [_concept(folder)], **parts))
    found = {key: value for key, value in draft.config.items() if "text_encoder" in key and "prec" not in key}
    assert found == expected
