"""Every key that SimpleTuner's users have is either a key here or known by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from simpletuner.helpers.configuration.loading.known_keys import (
    ALIASES,
    CONFIG_KEYS,
    DATASET_KEYS,
    LYCORIS_KEYS,
    PRESET_KEYS,
    Unsupported,
)

from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.loading.known_values import UNSUPPORTED_VALUES
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig, TargetPreset

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


@pytest.mark.parametrize("name", CONFIG_NAMES.split())
def test_every_name_of_config_json_is_known(name: str) -> None:
    homes = [name in KEYS.owners, name in ALIASES, name in CONFIG_KEYS]
    assert sum(homes) == 1


@pytest.mark.parametrize("name", DATASET_NAMES.split())
def test_every_name_of_the_dataset_json_is_known(name: str) -> None:
    assert (name in DatasetConfig.model_fields) + (name in DATASET_KEYS) == 1


def test_what_is_supported_is_not_called_unsupported() -> None:
    assert not KEYS.owners.keys() & CONFIG_KEYS.keys()
    assert not DatasetConfig.model_fields.keys() & DATASET_KEYS.keys()
    assert not LycorisConfig.model_fields.keys() & LYCORIS_KEYS.keys()
    assert not TargetPreset.model_fields.keys() & PRESET_KEYS.keys()
    assert set(ALIASES.values()) <= KEYS.owners.keys()


@pytest.mark.parametrize("name", sorted(CONFIG_KEYS))
def test_an_unsupported_key_is_named_with_advice_that_is_a_sentence(workspace: Workspace, name: str) -> None:
    message = workspace.problems(**{name: "something"})
    assert message.splitlines()[0] == "config.json: 1 problem"
    assert f"  {name}  known from SimpleTuner, not supported here. " in message
    assert message.endswith(".")


@pytest.mark.parametrize("value", [False, "false", None, "", 0, "0", 0.0, "none", "None", [], {}])
def test_a_feature_switched_off_is_no_problem(workspace: Workspace, value: object) -> None:
    assert "use_ema" not in workspace.load(use_ema=value).resolved()


@pytest.mark.parametrize("value", [True, "true", 1, "yes", ["a"], {"a": 1}])
def test_a_feature_switched_on_is_a_problem(workspace: Workspace, value: object) -> None:
    assert "use_ema  known from SimpleTuner" in workspace.problems(use_ema=value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantize_via", "cpu"),
        ("attention_mechanism", "diffusers"),
        ("offload_during_startup", True),
        ("loss_type", "l2"),
        ("disable_bucket_pruning", "true"),
    ],
)
def test_a_value_that_asks_for_what_happens_anyway_is_no_problem(
    workspace: Workspace, key: str, value: object
) -> None:
    assert key not in workspace.load(**{key: value}).resolved()
    assert key in workspace.problems(**{key: "something else"})


def test_harmless_values_are_written_as_they_are_compared() -> None:
    for table in (CONFIG_KEYS, DATASET_KEYS, LYCORIS_KEYS, PRESET_KEYS):
        for entry in table.values():
            assert all(value == value.lower().strip() for value in entry.harmless)
            assert entry.advice.endswith(".")


@pytest.mark.parametrize("value", [0, 0.0, "0", "0.0", False, None])
def test_nothing_is_asked_for_by_zero(value: object) -> None:
    assert Unsupported("").is_noop(value)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, value in UNSUPPORTED_VALUES if key in KEYS.owners]
)
def test_an_unsupported_value_is_named_with_advice(workspace: Workspace, key: str, value: str) -> None:
    message = workspace.problems(**{key: value})
    assert (
        f'"{value}": known from SimpleTuner, not supported here. {UNSUPPORTED_VALUES[key, value]}' in message
    )


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, value in UNSUPPORTED_VALUES if key in DatasetConfig.model_fields]
)
def test_an_unsupported_value_of_a_dataset_is_named_with_advice(
    workspace: Workspace, key: str, value: str
) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", key: value}]
    assert f'photos.{key}  "{value}": known from SimpleTuner' in " ".join(
        workspace.problems().split(" ")
    ).replace("   ", "  ")


@pytest.mark.parametrize("name", sorted(DATASET_KEYS))
def test_an_unsupported_key_of_a_dataset_is_named(workspace: Workspace, name: str) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", name: "something"}]
    assert f"  photos.{name}  known from SimpleTuner, not supported here. " in workspace.problems()
