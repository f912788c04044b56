"""SimpleTuner's keys: each has a field here or advice; the tests list all offenders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.loading import unsupported_keys as module
from simpletuner.helpers.configuration.loading.conditioning import OWNER
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.loading.remote_folders import BUCKET, PREFIX
from simpletuner.helpers.configuration.loading.translation import tables
from simpletuner.helpers.configuration.loading.unsupported_keys import Table, UnsupportedKey, unsupported_keys
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig, TargetPreset
from simpletuner.helpers.configuration.schema.masks import ConditioningConfig
from simpletuner.helpers.configuration.schema.values import is_off

if TYPE_CHECKING:
    from conftest import Workspace

CONFIG_NAMES = """
model_family model_flavour model_flavor model_type pretrained_model_name_or_path
pretrained_transformer_model_name_or_path pretrained_transformer_subfolder
pretrained_unet_model_name_or_path pretrained_unet_subfolder pretrained_vae_model_name_or_path
pretrained_vae_subfolder pretrained_t5_model_name_or_path revision variant prediction_type
rescale_betas_zero_snr controlnet tread_config fuse_qkv_projections lora_type lora_rank lora_alpha
lora_dropout lora_init_type use_dora peft_lora_target_modules flux_lora_target lora_format lycoris_config
init_lora init_lokr_norm validation_lycoris_strength max_train_steps num_train_epochs train_batch_size
gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps lr_end lr_power lr_num_cycles
lr_scale optimizer optimizer_config max_grad_norm grad_clip_method gradient_checkpointing
gradient_checkpointing_interval seed caption_dropout_probability train_text_encoder use_ema ema_decay
ema_update_interval ema_device ema_validation loss_type huber_schedule huber_c snr_gamma offset_noise
noise_offset noise_offset_probability input_perturbation timestep_bias_strategy timestep_bias_begin
timestep_bias_end timestep_bias_multiplier timestep_bias_portion flow_sigmoid_scale
flow_use_uniform_schedule flow_use_beta_schedule flow_beta_schedule_alpha flow_beta_schedule_beta
flow_schedule_shift flow_schedule_auto_shift flux_guidance_mode flux_guidance_value flux_guidance_min
flux_guidance_max flux_attention_masked_training masked_loss_probability mixed_precision
base_model_precision text_encoder_1_precision text_encoder_2_precision text_encoder_3_precision
text_encoder_4_precision attention_mechanism vae_dtype vae_batch_size vae_enable_tiling
vae_enable_slicing keep_vae_loaded offload_during_startup enable_group_offload group_offload_type
group_offload_blocks_per_group group_offload_use_stream group_offload_to_disk_path dynamo_backend
dynamo_mode dynamo_use_regional_compilation fsdp_enable fsdp_version fsdp_reshard_after_forward
fsdp_state_dict_type fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_cpu_offload
deepspeed_config data_backend_config resolution resolution_type minimum_image_size maximum_image_size
target_downsample_size aspect_bucket_rounding aspect_bucket_alignment disable_bucket_pruning
caption_strategy instance_prompt cache_dir_text cache_dir_vae compress_disk_cache vae_cache_ondemand
text_cache_ondemand text_encoder_batch_size delete_problematic_images output_dir checkpoint_step_interval
checkpoint_epoch_interval checkpoints_total_limit resume_from_checkpoint push_to_hub
push_checkpoints_to_hub hub_model_id model_card_private report_to tracker_project_name tracker_run_name
webhook_config validation_prompt validation_prompt_library user_prompt_library validation_negative_prompt
validation_resolution validation_guidance validation_guidance_real validation_guidance_rescale
validation_no_cfg_until_timestep validation_num_inference_steps validation_seed
validation_noise_scheduler num_validation_images validation_step_interval validation_epoch_interval
validation_on_startup validation_disable disable_benchmark validation_torch_compile eval_steps_interval
eval_dataset_id evaluation_type validation_steps checkpointing_steps save_total_limit
"""

DATASET_NAMES = """
id type dataset_type disabled instance_data_dir cache_dir_vae text_embeds resolution resolution_type
minimum_image_size maximum_image_size target_downsample_size minimum_aspect_ratio maximum_aspect_ratio
max_num_samples crop crop_style crop_aspect crop_aspect_buckets caption_strategy instance_prompt
prepend_instance_prompt only_instance_prompt caption_shuffle repeats probability train_batch_size
start_epoch end_epoch start_step end_step timestep_sampling_offset is_regularisation_data
is_regularization_data conditioning_data conditioning_type source_dataset_id metadata_backend parquet
aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id aws_secret_access_key aws_data_prefix
dataset_name split image_column caption_column caption_filter_list vae_cache_clear_each_epoch
skip_file_discovery preserve_data_backend_cache
"""


SUPPORTED: Mapping[Table, Mapping[str, object]] = {
    "config.json": KEYS.owners,
    "dataset": DatasetConfig.model_fields,
    "lycoris": LycorisConfig.model_fields,
    "apply_preset": TargetPreset.model_fields,
}
UNSUPPORTED = "known from SimpleTuner, not supported here. "


def rows(message: str) -> dict[str, str]:
    """Key -> text of the one file that has problems."""
    heading, *lines = message.splitlines()
    assert heading.split(": ")[1] == f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return dict(line.split(maxsplit=1) for line in lines)


def without_relation(table: Table) -> dict[str, UnsupportedKey]:
    """The keys that are refused at every value that switches something on."""
    effects = tables(table).without_effect
    return {
        key: entry
        for key, entry in unsupported_keys(table).items()
        if not any(each.relation for each in effects(key))
    }


def test_every_name_of_config_json_is_known() -> None:
    table = tables("config.json")
    names, known = CONFIG_NAMES.split(), {*KEYS.owners, *table.aliases, *unsupported_keys("config.json")}
    assert len(names) > 160
    assert not [name for name in names if name not in known and not any(table.without_effect(name))]


def test_every_name_of_the_dataset_json_is_known() -> None:
    table = tables("dataset")
    names = DATASET_NAMES.split()
    sections = {*DatasetConfig.model_fields, *ConditioningConfig.model_fields, OWNER, BUCKET, PREFIX}
    known = {*sections, *table.aliases, *unsupported_keys("dataset")}
    assert len(names) > 50
    assert not [name for name in names if name not in known and not any(table.without_effect(name))]


def test_no_supported_key_is_called_unsupported() -> None:
    assert SUPPORTED.keys() == set(get_args(Table))
    in_both = {table: keys & unsupported_keys(table).keys() for table, keys in SUPPORTED.items()}
    assert not any(in_both.values()), in_both


def test_every_key_stands_in_one_group_with_advice() -> None:
    path = Path(module.__file__).with_name("unsupported_keys.json")
    groups_of = json.loads(path.read_text(encoding="utf-8"))
    assert groups_of.keys() == set(get_args(Table))
    offenders = []
    for table, groups in groups_of.items():
        keys = [key for group in groups for key in group["keys"]]
        offenders += [(table, key) for key in set(keys) if keys.count(key) > 1]
        offenders += [(table, group["advice"]) for group in groups if not group["advice"].endswith(".")]
        offenders += [(table, name) for group in groups for name in group.keys() - {"advice", "keys"}]
    assert not offenders


def test_every_unsupported_key_is_named_with_its_advice(workspace: Workspace) -> None:
    unsupported = without_relation("config.json")
    # These belong to a key that is supported, and have no effect without it.
    unsupported = {
        key: entry
        for key, entry in unsupported.items()
        if not key.startswith(("group_offload", "soft_min_snr", "freeze_encoder", "dynamo"))
        and key not in ("modelspec_comment", "publishing_config", "text_encoder_limit", "save_text_encoder")
    }
    found = rows(workspace.problems(**dict.fromkeys(unsupported, "something")))
    assert found == {key: UNSUPPORTED + entry.advice for key, entry in unsupported.items()}


def test_every_unsupported_key_of_a_dataset_is_named_with_its_advice(workspace: Workspace) -> None:
    unsupported = dict(without_relation("dataset"))
    del unsupported["conditioning_config"]  # belongs to conditioning, and has no effect without it
    dataset = {"id": "photos", "instance_data_dir": "images"}
    workspace.datasets = [dataset | dict.fromkeys(unsupported, "something")]
    found = rows(workspace.problems())
    assert found == {f"photos.{key}": UNSUPPORTED + entry.advice for key, entry in unsupported.items()}


def test_every_unsupported_key_of_the_lycoris_json_is_named_with_its_advice(workspace: Workspace) -> None:
    tables = {"": unsupported_keys("lycoris"), "apply_preset.": unsupported_keys("apply_preset")}
    workspace.lycoris |= dict.fromkeys(tables[""], "something")
    workspace.lycoris["apply_preset"] = dict.fromkeys(tables["apply_preset."], "something")
    found = rows(workspace.problems())
    assert found == {
        f"{prefix}{key}": UNSUPPORTED + entry.advice
        for prefix, table in tables.items()
        for key, entry in table.items()
    }


@pytest.mark.parametrize(
    "value", [False, "false", None, "", 0, "0", 0.0, -0.0, "0.0", "none", "None", [], {}]
)
def test_a_feature_switched_off_is_no_problem(workspace: Workspace, value: object) -> None:
    assert is_off(value)
    assert "controlnet" not in workspace.load(controlnet=value).resolved()


@pytest.mark.parametrize("value", [True, "true", 1, "yes", ["a"], {"a": 1}])
def test_a_feature_switched_on_is_a_problem(workspace: Workspace, value: object) -> None:
    assert rows(workspace.problems(controlnet=value)).keys() == {"controlnet"}


def test_the_table_is_read_only_for_an_unknown_key(workspace: Workspace) -> None:
    unsupported_keys.cache_clear()
    workspace.load("seed=3", validation_prompt="x")
    assert unsupported_keys.cache_info().misses == 0
    workspace.load(controlnet=False)
    assert unsupported_keys.cache_info().misses == 1


def test_every_unsupported_value_is_named_with_its_advice(workspace: Workspace) -> None:
    values = {pair: advice for pair, advice in UNSUPPORTED_VALUES.items() if pair[0] in KEYS.owners}
    assert len(values) > 90
    wrong, config = [], workspace.config
    for (key, value), advice in values.items():
        workspace.config = config | {key: value}
        name = "report_to[0]" if key == "report_to" else key  # the one list among them
        found = rows(workspace.problems())
        if found != {name: f'"{value}": {UNSUPPORTED}{advice}'}:
            wrong.append((key, value, found))
    assert not wrong


def test_every_unsupported_value_of_a_dataset_is_named_with_its_advice(workspace: Workspace) -> None:
    fields = DatasetConfig.model_fields
    values = {pair: advice for pair, advice in UNSUPPORTED_VALUES.items() if pair[0] in fields}
    assert len(values) > 8
    wrong = []
    for (key, value), advice in values.items():
        workspace.datasets = [{"id": "photos", "instance_data_dir": "images", key: value}]
        found = rows(workspace.problems())
        if found != {f"photos.{key}": f'"{value}": {UNSUPPORTED}{advice}'}:
            wrong.append((key, value, found))
    assert not wrong


@pytest.mark.parametrize(
    ("key", "value", "says", "never"),
    [
        ("t5_padding", "zero", "Flux.1", "family"),
        ("controlnet", True, "ControlNet is not supported", "TREAD"),
        ("noise_scheduler", "flowmatch", "unknown key", "Did you mean"),
        ("caption_tag_dropout", 0.1, "unknown key", "Did you mean"),
    ],
)
def test_advice_does_not_lead_to_another_run(
    workspace: Workspace, key: str, value: object, says: str, never: str
) -> None:
    message = rows(workspace.problems(**{key: value}))[key]
    assert says in message
    assert never not in message


def test_a_dataset_key_of_another_trainer_gets_no_guess_that_means_something_else(
    workspace: Workspace,
) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", "token_dropout_rate": 0.1}]
    assert rows(workspace.problems()) == {"photos.token_dropout_rate": "unknown key."}


def test_a_short_form_of_tag_dropout_leads_to_the_key(workspace: Workspace) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", "caption_tag_dropout": 0.1}]
    assert "caption_tag_dropout_rate" in rows(workspace.problems())["photos.caption_tag_dropout"]


@pytest.mark.parametrize("path", ["config/prompts.json", "prompts.json", "./prompts"])
def test_a_path_as_the_prompt_library_of_the_package_means_user_prompt_library(
    workspace: Workspace, path: str
) -> None:
    message = rows(workspace.problems(validation_prompt_library=path))["validation_prompt_library"]
    assert f'"{path}"' in message
    assert "user_prompt_library" in message
