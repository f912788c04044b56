"""ai-toolkit: what each kind of setting becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.draft import Draft
from simpletuner.helpers.configuration.migration.reading import flattened
from simpletuner.helpers.errors import ConfigError
from tests.unit.configuration.migration.foreign_files import ai_toolkit, decision, images, migrate, toml


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images(tmp_path / "dog", 3, caption="a dog")


@pytest.mark.parametrize(
    ("section", "keys", "ours"),
    [
        ("train", {"steps": 100}, {"max_train_steps": 100, "gradient_accumulation_steps": 1}),
        (
            "train",
            {"steps": 100, "gradient_accumulation_steps": 4},
            {"max_train_steps": 25, "gradient_accumulation_steps": 4, "checkpoint_step_interval": 250},
        ),
        (
            "train",
            {"steps": 100, "gradient_accumulation": 4},
            {"max_train_steps": 100, "gradient_accumulation_steps": 4, "checkpoint_step_interval": 1000},
        ),
        ("train", {"lr": 1e-4, "unet_lr": 5e-5}, {"learning_rate": 5e-5}),
        ("train", {"lr": "1e-4"}, {"learning_rate": 1e-4}),
        (
            "train",
            {"optimizer": "adamw8bit"},
            {"optimizer": "bnb-adamw8bit", "optimizer_config": {"eps": 1e-6}},
        ),
        (
            "train",
            {"optimizer": "adamw", "optimizer_params": {"weight_decay": 1e-4}},
            {"optimizer_config": {"eps": 1e-6, "weight_decay": 1e-4}},
        ),
        ("train", {"optimizer": "prodigy", "lr": 1e-4}, {"optimizer": "prodigy", "learning_rate": 1.0}),
        ("train", {"dtype": "fp16"}, {"mixed_precision": "fp16"}),
        (
            "train",
            {"lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"num_warmup_steps": 9}},
            {"lr_warmup_steps": 9},
        ),
        ("train", {"min_snr_gamma": 5.0}, {"snr_gamma": 5.0}),
        (
            "train",
            {"noise_offset": 0.05},
            {"offset_noise": True, "noise_offset": 0.05, "noise_offset_probability": 1.0},
        ),
        (
            "train",
            {"min_denoising_steps": 100, "max_denoising_steps": 600},
            {"min_timestep": 400, "max_timestep": 900},
        ),
        ("train", {"content_or_style": "style"}, {"flow_use_beta_schedule": None}),
        ("train", {"disable_sampling": True}, {"validation_disable": True}),
        ("network", {"linear": 32, "linear_alpha": 16}, {"lora_rank": 32, "lora_alpha": 16}),
        ("network", {"rank": 4}, {"lora_rank": 4}),
        ("network", {"dropout": 0.2}, {"lora_dropout": 0.2}),
        (
            "save",
            {"save_every": 250, "max_step_saves_to_keep": 4},
            {"checkpoint_step_interval": 250, "checkpoints_total_limit": 4},
        ),
        (
            "model",
            {"quantize": True},
            {"base_model_precision": "fp8-torchao", "text_encoder_2_precision": "fp8-torchao"},
        ),
        ("model", {"quantize": True, "quantize_te": False}, {"text_encoder_1_precision": None}),
        ("model", {"quantize": True, "qtype": "qint8"}, {"base_model_precision": "int8-torchao"}),
        (
            "model",
            {"layer_offloading": True},
            {"enable_group_offload": True, "group_offload_type": "leaf_level"},
        ),
        (
            "logging",
            {"use_wandb": True, "project_name": "dogs"},
            {"report_to": "wandb", "tracker_project_name": "dogs"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_setting_becomes_ours(
    folder: Path, tmp_path: Path, section: str, keys: dict[str, object], ours: dict[str, JsonValue]
) -> None:
    draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], **{section: keys}))
    assert {key: draft.config.get(key) for key in ours} == ours


def test_every_key_of_a_job_is_decided_once(folder: Path, tmp_path: Path) -> None:
    file = ai_toolkit(
        tmp_path / "job.json",
        [{"folder_path": str(folder), "flip_x": True, "odd": 1}],
        train={"ema_config": {"use_ema": True}, "noise_offset": 0.1, "odd": 2},
        sample={"prompts": ["a"], "neg": "", "walk_seed": True},
    )
    keys = [each.key for each in migrate(file).decisions]
    process = json.loads(file.read_text())["config"]["process"][0]
    entry = process.pop("datasets")[0]
    given = {f"process[0].{key}" for key, _ in flattened(process)}
    given |= {f"process[0].datasets[0].{key}" for key in entry}
    assert len(keys) == len(set(keys))
    assert given <= set(keys)


def test_each_resolution_is_a_dataset_of_all_images(folder: Path, tmp_path: Path) -> None:
    entry = {"folder_path": str(folder), "resolution": [512, 768, 1024], "num_repeats": 3}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [entry]))
    (found,) = draft.datasets
    assert (found["id"], found["resolution"], found["repeats"]) == ("dog", [512, 768, 1024], 2)
    assert draft.config["aspect_bucket_alignment"] == 64


@pytest.mark.parametrize(
    ("weights", "ours"),
    [((None, -0.5), [1, -0.5]), ((1, None), [None, None]), ((2.0, -1), [2, -1])],
    ids=["one", "full", "both"],
)
def test_weights_of_datasets_are_strengths_of_a_slider(
    folder: Path, tmp_path: Path, weights: tuple[float | None, ...], ours: list[float | None]
) -> None:
    entries = [
        {"folder_path": str(folder)} | ({} if weight is None else {"network_weight": weight})
        for weight in weights
    ]
    draft = migrate(ai_toolkit(tmp_path / "job.json", entries))
    assert [each.get("slider_strength") for each in draft.datasets] == ours


@pytest.mark.parametrize(
    ("keys", "target"),
    [
        ({"is_reg": True}, "data"),
        ({"prior_reg": True}, "base"),
        ({"is_reg": True, "prior_reg": True}, "base"),
    ],
    ids=["is_reg", "prior_reg", "both"],
)
def test_regularisation_datasets_keep_their_target(
    folder: Path, tmp_path: Path, keys: dict[str, object], target: str
) -> None:
    entry = {"folder_path": str(folder), "resolution": 512}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [entry, entry | keys], train={"reg_weight": 0.5}))
    assert [bool(each.get("is_regularisation_data")) for each in draft.datasets] == [False, True]
    assert (draft.config["regularisation_target"], draft.config["prior_loss_weight"]) == (target, 0.5)
    with pytest.raises(ConfigError):
        migrate(ai_toolkit(tmp_path / "alone.json", [entry | keys]))


@pytest.mark.parametrize(("given", "decay"), [({"ema_decay": 0.99}, 0.99), ({}, 0.999)])
def test_the_average_is_the_adapter_as_there(
    folder: Path, tmp_path: Path, given: dict[str, object], decay: float
) -> None:
    train = {"ema_config": {"use_ema": True, **given}}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], train=train))
    ours = {"use_ema": True, "ema_adapter_file": "main", "ema_validation": "ema_only", "ema_decay": decay}
    assert {key: value for key, value in draft.config.items() if "ema" in key.split("_")} == ours
    assert decision(draft, "process[0].train.ema_config.use_ema").outcome == "translated"
    assert decision(draft, "process[0].train.ema_config.ema_decay").outcome == "approximate"


def test_an_average_that_is_off_stays_off(folder: Path, tmp_path: Path) -> None:
    train = {"ema_config": {"use_ema": False, "ema_decay": 0.99}}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], train=train))
    assert not {"use_ema", "ema_decay", "ema_adapter_file"} & draft.config.keys()
    for key in ("use_ema", "ema_decay"):
        assert decision(draft, f"process[0].train.ema_config.{key}").outcome == "no effect"


@pytest.mark.parametrize(
    ("way", "ours"),
    [
        ("sigmoid", {"flow_schedule_shift": 0}),
        ("linear", {"flow_use_uniform_schedule": True, "flow_schedule_shift": 0}),
        ("weighted", {"flow_use_uniform_schedule": True, "flow_schedule_shift": 0}),
        ("shift", {"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True}),
        (
            {"timestep_type": "linear", "content_or_style": "style"},
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 1 / 3, "flow_beta_schedule_beta": 1},
        ),
        (
            {"timestep_type": "linear", "content_or_style": "content", "max_denoising_steps": 900},
            {
                "flow_use_beta_schedule": True,
                "flow_beta_schedule_alpha": 1,
                "flow_beta_schedule_beta": 1 / 3,
                "min_timestep": 100,
            },
        ),
        ({"content_or_style": "style", "max_denoising_steps": 900}, {"min_timestep": None}),
        ({"noise_offset": 0.1}, {"offset_noise": None}),
    ],
    ids=str,
)
def test_noise_levels_of_flow_matching_become_ours(
    folder: Path, tmp_path: Path, way: str | dict[str, object], ours: dict[str, JsonValue]
) -> None:
    model = {"name_or_path": "black-forest-labs/FLUX.1-dev", "arch": "flux"}
    file = ai_toolkit(
        tmp_path / "job.json",
        [{"folder_path": str(folder)}],
        model=model,
        train={"timestep_type": way} if isinstance(way, str) else way,
    )
    config = migrate(file).config
    assert (config["model_family"], config["model_flavour"]) == ("flux", "dev")
    assert {key: config.get(key) for key in ours} == ours


def test_a_network_of_named_layers_is_lycoris(folder: Path, tmp_path: Path) -> None:
    network = {"network_kwargs": {"only_if_contains": ["blocks.7.proj_out"]}}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], network=network))
    assert draft.lycoris is not None
    assert draft.lycoris["apply_preset"] == {"target_name": [r".*blocks\.7\.proj_out.*"], "target_module": []}


def test_a_lokr_of_full_rank_keeps_its_factor(folder: Path, tmp_path: Path) -> None:
    network = {"type": "lokr", "lokr_factor": 8}
    draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], network=network))
    assert draft.lycoris is not None
    assert (draft.lycoris["algo"], draft.lycoris["factor"], draft.lycoris["linear_dim"]) == (
        "lokr",
        8,
        10_000,
    )


def test_the_trigger_word_stands_before_captions_and_in_prompts(folder: Path, tmp_path: Path) -> None:
    sample = {"prompts": ["[trigger] on a beach"], "sample_every": 50, "width": 64, "height": 96, "seed": 4}
    file = ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], sample=sample)
    file.write_text(
        file.read_text().replace('"type": "sd_trainer"', '"type": "sd_trainer", "trigger_word": "sks"')
    )
    draft = migrate(file)
    assert draft.datasets[0]["instance_prompt"] == "sks"
    assert draft.datasets[0]["prepend_instance_prompt"] is True
    ours = {
        "validation_prompt": "sks on a beach",
        "validation_resolution": "64x96",
        "validation_seed": 4,
        "validation_step_interval": 50,
        "validation_on_startup": True,
    }
    assert {key: draft.config[key] for key in ours} == ours


@pytest.mark.parametrize("trigger", ["", "sks"], ids=["no trigger", "trigger"])
def test_captions_in_json_files_stay_there(folder: Path, tmp_path: Path, trigger: str) -> None:
    for file in folder.glob("*.txt"):
        file.with_suffix(".json").write_text('{"caption": "a dog"}')
        file.unlink()
    file = ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder), "caption_ext": "json"}])
    written = f'"type": "sd_trainer", "trigger_word": "{trigger}"'
    file.write_text(file.read_text().replace('"type": "sd_trainer"', written))
    assert migrate(file).datasets[0]["caption_strategy"] == "json"


def test_captions_in_files_that_are_not_read_are_to_do(folder: Path, tmp_path: Path) -> None:
    datasets = [{"folder_path": str(folder), "caption_ext": ".tags"}]
    draft = migrate(ai_toolkit(tmp_path / "job.json", datasets))
    (found,) = [each for each in draft.decisions if each.key.endswith("caption_ext")]
    assert found.outcome == "not translated"


@pytest.mark.parametrize(
    ("section", "keys", "found"),
    [
        ("model", {"arch": "qwen_image"}, "qwen_image"),
        ("model", {"arch": None}, "arch"),
        ("train", {"train_unet": False}, "train_unet"),
        ("network", {"type": "lorm"}, "network.type"),
        ("train", {"gradient_accumulation_steps": -1}, "gradient_accumulation_steps"),
    ],
    ids=["family", "none", "no denoiser", "network", "whole epoch"],
)
def test_another_kind_of_job_is_an_error(
    folder: Path, tmp_path: Path, section: str, keys: dict[str, object], found: str
) -> None:
    file = ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], **{section: keys})
    with pytest.raises(ConfigError, match=found):
        migrate(file)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("config:\n  a: &here [1]\n  b: *here\n", "line 2.*'here'"),
        ("job: extension\nconfig:\n  process: [\n", "line"),
        ("job: extension\nconfig:\n  process:\n    - type: sd_trainer\n", "arch|datasets"),
        ("- 1\n- 2\n", "list"),
    ],
    ids=["anchor", "cut off", "no datasets", "a list"],
)
def test_half_a_yaml_or_one_with_anchors_is_one_clear_error(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as error:
        migrate(toml(tmp_path / "job.yaml", text))
    assert "job.yaml" in str(error.value)


def test_numbers_with_an_exponent_are_numbers(folder: Path, tmp_path: Path) -> None:
    text = f"""
    job: extension
    config:
      name: mine
      process:
        - type: sd_trainer
          network: {{type: lora, linear: 4}}
          datasets: [{{folder_path: "{folder}"}}]
          train: {{steps: 10, lr: 1e-4}}
          model: {{name_or_path: a/b, is_xl: true}}
    """
    assert migrate(toml(tmp_path / "job.yaml", text)).config["learning_rate"] == 1e-4


def test_tags_are_shuffled_and_dropped_by_the_captions_at_hand(tmp_path: Path) -> None:
    keys = {"shuffle_tokens": True, "keep_tokens": 1, "token_dropout_rate": 0.1}
    for name, caption in (("tags", "sks, a, b"), ("words", "a dog")):
        folder = images(tmp_path / name, 2, caption=caption)
        draft = migrate(ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder), **keys}]))
        entry = draft.datasets[0]
        found = decision(draft, "process[0].datasets[0].shuffle_tokens").outcome
        if name == "tags":
            shuffle = {"enable": True, "count": 4, "include_original": False, "position_start": 1}
            assert (entry["caption_shuffle"], entry["caption_tag_dropout_rate"]) == (shuffle, 0.1)
            assert found == "approximate"
        else:
            assert "caption_shuffle" not in entry
            assert found == "no effect"


@pytest.mark.parametrize(
    ("rates", "run", "config", "own"),
    [
        ((0.1, 0.1), None, 0.1, [None, None]),
        ((0.1, 0.3), None, 0, [0.1, 0.3]),
        ((0.1, 0.3), 0.2, 0.2, [None, None]),
    ],
)
def test_each_dataset_has_its_rate_of_caption_dropout(
    folder: Path,
    tmp_path: Path,
    rates: tuple[float, float],
    run: float | None,
    config: float,
    own: list[float],
) -> None:
    entries = [{"folder_path": str(folder), "caption_dropout_rate": rate} for rate in rates]
    train = {} if run is None else {"prompt_dropout_prob": run}
    draft = migrate(ai_toolkit(tmp_path / "job.json", entries, train=train))
    assert draft.config["caption_dropout_probability"] == config
    assert [each.get("caption_dropout_probability") for each in draft.datasets] == own


def edit_job(tmp_path: Path, arch: str, folder: Path, **sample: object) -> Draft:
    images(tmp_path / "before", 3)
    images(tmp_path / "sketch", 3)
    datasets = [
        {
            "folder_path": str(folder),
            "control_path": ["before"],
            "control_path_1": str(tmp_path / "sketch"),
            "resolution": [64, 96],
        },
        {"folder_path": str(folder), "is_reg": True},
    ]
    return migrate(ai_toolkit(tmp_path / "job.json", datasets, model={"arch": arch}, sample=sample))


@pytest.mark.parametrize(
    ("arch", "kind"), [("flux_kontext", "reference_strict"), ("flux2_klein_4b", "reference_loose")]
)
def test_control_images_become_references_of_a_model_that_edits(
    folder: Path, tmp_path: Path, arch: str, kind: str
) -> None:
    draft = edit_job(tmp_path, arch, folder)
    names = ["before-references", "sketch-references"]
    assert [each.get("conditioning_data") for each in draft.datasets] == [names, None, None, None]
    found = {str(each["id"]): each for each in draft.datasets[2:]}
    assert list(found) == names
    assert {each["conditioning_type"] for each in found.values()} == {kind}
    assert found["before-references"]["instance_data_dir"] == str(tmp_path / "before")
    assert draft.config["conditioning_multidataset_sampling"] == "combined"
    assert draft.config["model_family"] == arch.partition("_")[0]
    assert (draft.config.get("model_flavour") == "kontext") is (arch == "flux_kontext")
    for key in ("control_path", "control_path_1"):
        assert decision(draft, f"process[0].datasets[0].{key}").outcome == "approximate"


def test_control_images_of_prompts_become_their_reference_images(folder: Path, tmp_path: Path) -> None:
    samples: list[object] = [
        {"prompt": "make it red", "ctrl_img": "before/image0.png", "ctrl_img_1": "before/image0.png"},
        {"prompt": "both", "ctrl_img_1": "before/image0.png", "ctrl_img_2": "sketch/image1.png"},
        {"prompt": "a cat"},
    ]
    draft = edit_job(
        tmp_path, "flux_kontext", folder, samples=samples, prompts=["it --ctrl_img before/image1.png"]
    )
    before, sketch = (
        [str(path) for path in sorted((tmp_path / name).glob("*.png"))] for name in ("before", "sketch")
    )
    assert list(draft.prompts.values()) == [
        {"prompt": "it", "image": before[1]},
        {"prompt": "make it red", "image": before[0]},
        {"prompt": "both", "image": [before[0], sketch[1]]},
        "a cat",
    ]
    assert decision(draft, "process[0].sample.samples").outcome == "translated"
    only = edit_job(tmp_path, "flux_kontext", folder, samples=samples[:1])
    assert only.config["validation_reference_images"] == before[0]
    assert decision(only, "process[0].sample.samples").outcome == "translated"


def test_control_images_of_a_model_that_does_not_edit_are_left_out(folder: Path, tmp_path: Path) -> None:
    samples = [{"prompt": "make it red", "ctrl_img": "before/image0.png"}]
    draft = edit_job(tmp_path, "flux", folder, samples=samples)
    assert not any("conditioning_data" in each for each in draft.datasets)
    assert len(draft.datasets) == 2
    assert "validation_reference_images" not in draft.config
    assert decision(draft, "process[0].datasets[0].control_path").outcome == "not translated"
    assert decision(draft, "process[0].sample.samples").outcome == "approximate"


@pytest.mark.parametrize(
    ("train", "rates"),
    [
        ({"lr": 1e-4, "text_encoder_lr": 1e-5}, None),
        ({"lr": 1e-4, "train_text_encoder": True, "text_encoder_lr": 1e-5}, [1e-5]),
        ({"lr": 1e-4, "train_text_encoder": True}, [1e-4]),
    ],
    ids=["off", "rate", "common rate"],
)
def test_text_encoders_are_trained_with_their_rate(
    folder: Path, tmp_path: Path, train: dict[str, object], rates: list[float] | None
) -> None:
    model = {"name_or_path": "a/b", "is_xl": True}
    job = ai_toolkit(tmp_path / "job.json", [{"folder_path": str(folder)}], train=train, model=model)
    draft = migrate(job)
    assert draft.config.get("train_text_encoder", False) is (rates is not None)
    assert draft.config.get("text_encoder_lr") == rates
