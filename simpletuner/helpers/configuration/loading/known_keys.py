"""SimpleTuner's keys and values that are not supported here, and what to do about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "validation_steps": "validation_step_interval",
        "checkpointing_steps": "checkpoint_step_interval",
        "save_total_limit": "checkpoints_total_limit",
        "model_flavor": "model_flavour",
    }
)
"""Older name of a key -> its name."""

_OFF = ("false", "none", "null", "", "0", "0.0", "off", "no")


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A key that is recognised by name alone."""

    advice: str
    """What to do, as a sentence."""
    harmless: tuple[str, ...] = ()
    """Values that ask for what happens here anyway, beside those that switch a feature off."""

    def is_noop(self, value: object) -> bool:
        """Whether a value asks only for what happens here anyway."""
        if isinstance(value, str | bool | int | float):
            text = str(value).strip().lower()
            return value == 0 or text in _OFF or text in self.harmless
        return value in (None, [], {})


def unsupported(entry: Unsupported) -> str:
    """What a message says about such a key."""
    return f"known from SimpleTuner, not supported here. {entry.advice}"


def _group(advice: str, names: str, *, harmless: tuple[str, ...] = ()) -> dict[str, Unsupported]:
    return dict.fromkeys(names.split(), Unsupported(advice, harmless))


_REMOVE = "Remove it."
_NO_NEED = "Remove it: nothing here needs it."
_DATASET = "Set it on a dataset in the dataset json instead."

CONFIG_KEYS: Mapping[str, Unsupported] = MappingProxyType(
    {
        **_group(
            "Remove it: adapters are trained on the denoiser alone.",
            "train_text_encoder text_encoder_lr text_encoder_limit freeze_encoder freeze_encoder_before "
            "freeze_encoder_after freeze_encoder_strategy layer_freeze_strategy freeze_unet_strategy "
            "fully_unload_text_encoder save_text_encoder",
        ),
        **_group(
            "Remove it: there is no control branch here.",
            "controlnet controlnet_model_name_or_path controlnet_custom_config control tread_config",
        ),
        **_group(
            "Remove it: it belongs to a model family that is not here.",
            "flux_fast_schedule sd3_t5_mask_behaviour sd3_t5_uncond_behaviour sd3_clip_uncond_behaviour "
            "t5_padding smoldit "
            "smoldit_config ltx_train_mode ltx_i2v_prob ltx_partial_noise_fraction ltx_protect_first_frame "
            "hidream_use_load_balancing_loss hidream_load_balancing_loss_weight acestep_lora_target "
            "framerate validation_num_video_frames "
            "validation_no_cfg_until_timestep validation_guidance_skip_layers "
            "validation_guidance_skip_layers_start validation_guidance_skip_layers_stop "
            "validation_guidance_skip_scale tokenizer_max_length unet_attention_slice refiner_training "
            "refiner_training_invert_schedule refiner_training_strength sdxl_refiner_uses_full_range",
        ),
        **_group(
            "Remove it: noise levels are drawn by the flow_ keys, and the target is the velocity.",
            "flow_matching_loss flow_custom_timesteps flow_timesteps_mode",
            harmless=("compatible", "diffusers"),
        ),
        **_group("Remove it: QKV projections stay apart, as adapters expect them.", "fuse_qkv_projections"),
        **_group(
            "Remove it: adapters start at zero effect; init_lora starts from a file.",
            "init_lokr_norm init_lora_weights peft_lora_mode singlora_ramp_up_steps slider_lora_target",
            harmless=("standard",),
        ),
        **_group(
            'Remove it: samples are weighted by snr_gamma, and the loss is "l2".',
            "huber_schedule huber_c snr_weight use_soft_min_snr soft_min_snr_sigma_data "
            "soft_min_snr_sigma_min soft_min_snr_gamma masked_loss_probability",
            harmless=("l2",),
        ),
        **_group(
            "Remove it: timesteps are drawn uniformly and noise is plain Gaussian.",
            "offset_noise noise_offset noise_offset_probability input_perturbation input_perturbation_steps "
            "timestep_bias_strategy timestep_bias_begin timestep_bias_end timestep_bias_multiplier "
            "timestep_bias_portion disable_segmented_timestep_sampling training_scheduler_timestep_spacing "
            "inference_scheduler_timestep_spacing scheduled_sampling_max_step_offset "
            "scheduled_sampling_strategy scheduled_sampling_probability diff2flow_enabled diff2flow_loss "
            "twinflow_enabled twinflow_target_step_count",
        ),
        **_group(
            "Remove it: the loss has no further terms.",
            "distillation_method distillation_config crepa_enabled crepa_block_index crepa_lambda "
            "crepa_encoder layersync_enabled layersync_student_block layersync_teacher_block "
            "layersync_lambda",
        ),
        **_group(
            "Remove it: no average of the weights is kept.",
            "use_ema ema_decay ema_update_interval ema_device ema_validation ema_cpu_only "
            "ema_foreach_disable non_ema_revision",
        ),
        **_group(
            'Put it into optimizer_config, for instance "weight_decay=0.01,eps=1e-8,beta1=0.9,beta2=0.999".',
            "adam_weight_decay adam_beta1 adam_beta2 adam_epsilon optimizer_beta1 optimizer_beta2 "
            "prodigy_steps optimizer_eps optimizer_weight_decay",
        ),
        **_group(
            "Set optimizer to adamw or prodigy instead.",
            "adam_bfloat16 use_8bit_adam use_adafactor_optimizer use_prodigy_optimizer use_dadapt_optimizer",
        ),
        **_group(
            "Remove it: the optimiser's state is as small as the adapter and stays on the device.",
            "optimizer_cpu_offload_method optimizer_offload_gradients optimizer_release_gradients "
            "fuse_optimizer offload_param_path",
        ),
        **_group(
            "Set learning_rate to the rate itself: it is not scaled by the batch.", "lr_scale lr_scale_sqrt"
        ),
        **_group(
            "Remove it: every layer is checkpointed, or none (gradient_checkpointing).",
            "gradient_checkpointing_interval gradient_checkpointing_backend",
            harmless=("torch",),
        ),
        **_group(
            "Remove it: the model is held in the format of mixed_precision.",
            "base_model_default_dtype quantize_via quantization_config quantize_activations "
            "gradient_precision vae_dtype upcast_attention",
            harmless=("unmodified", "default", "cpu", "accelerator", "pipeline"),
        ),
        **_group(
            "Remove it: attention is torch's scaled_dot_product_attention.",
            "attention_mechanism sageattention_usage enable_xformers_memory_efficient_attention",
            harmless=("diffusers", "sdpa", "inference"),
        ),
        **_group(
            "Remove it: no group is brought ahead of its turn, which the backward pass turns round.",
            "group_offload_use_stream",
        ),
        **_group(
            "Remove it: VAE and text encoders are unloaded before the denoiser is loaded, and "
            "enable_group_offload keeps its blocks on the host.",
            "keep_vae_loaded group_offload_to_disk_path "
            "group_offload_text_encoder group_offload_vae enable_model_cpu_offload musubi_blocks_to_swap "
            "musubi_block_swap_device ramtorch ramtorch_target_modules ramtorch_text_encoder ramtorch_vae "
            "vae_enable_patch_conv vae_enable_temporal_roll",
        ),
        **_group(
            "Remove it: VAE and text encoders are always unloaded before the denoiser is loaded.",
            "offload_during_startup delete_model_after_load",
            harmless=("true",),
        ),
        **_group(
            "Set TRAINING_DYNAMO_BACKEND for train.sh instead.",
            "dynamo_backend dynamo_mode dynamo_use_regional_compilation dynamo_fullgraph dynamo_dynamic",
        ),
        **_group(
            "Remove it: each process holds the whole model.",
            "fsdp_enable fsdp_version fsdp_reshard_after_forward fsdp_state_dict_type "
            "fsdp_cpu_ram_efficient_loading fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap "
            "fsdp_cpu_offload fsdp_limit_all_gathers fsdp_activation_checkpointing deepspeed_config "
            "context_parallel_size context_parallel_comm_strategy",
        ),
        **_group(
            "Set TRAINING_NUM_PROCESSES or TRAINING_NUM_MACHINES for train.sh instead.",
            "num_processes num_machines local_rank main_process_ip main_process_port machine_rank",
            harmless=("1", "-1"),
        ),
        **_group(
            "Remove it, and set minimum_image_size to leave small images out; large ones are only scaled "
            "down.",
            "maximum_image_size target_downsample_size",
        ),
        **_group(
            "Remove it: no bucket is left out; a small one repeats its images.",
            "disable_bucket_pruning",
            harmless=("true",),
        ),
        **_group(
            "Remove it: caches are keyed by content, complete before the first step and never compressed.",
            "compress_disk_cache vae_cache_ondemand text_cache_ondemand vae_cache_disable "
            "text_cache_disable vae_cache_scan_behaviour vae_cache_clear_each_epoch "
            "cache_clear_validation_prompts preserve_data_backend_cache skip_file_discovery "
            "aspect_bucket_disable_rebuild ignore_missing_files override_dataset_config "
            "metadata_update_interval cache_file_suffix",
        ),
        **_group(
            "Remove it: files are never deleted; what cannot be used is skipped and listed.",
            "delete_problematic_images delete_unwanted_images",
        ),
        **_group(
            "Set the environment variable HF_HOME instead; latents and text have cache_dir_vae, "
            "cache_dir_text.",
            "cache_dir",
        ),
        **_group(
            _NO_NEED,
            "write_batch_size read_batch_size image_processing_batch_size enable_multiprocessing "
            "max_workers num_workers dataloader_num_workers aws_max_pool_connections aws_config_file "
            "torch_num_threads dataloader_prefetch dataloader_prefetch_qlen aspect_bucket_worker_count "
            "accelerator_cache_clear_interval set_grads_to_none allow_tf32 disable_tf32 disable_accelerator "
            "seed_for_each_device print_filenames print_sampler_statistics debug_aspect_buckets "
            "debug_dataset_loader i_know_what_i_am_doing data_aesthetic_score overrides",
        ),
        **_group(
            "Remove it: how often a dataset is drawn is set by its repeats and probability.",
            "data_backend_sampling allow_dataset_oversubscription",
            harmless=("uniform",),
        ),
        **_group(
            _DATASET,
            "prepend_instance_prompt only_instance_prompt instance_data_dir instance_data_root "
            "caption_shuffle",
        ),
        **_group(
            "Use caption_strategy textfile: write each caption into a text file beside its image.",
            "parquet_caption_column parquet_filename_column",
        ),
        **_group(
            "Remove it: a run ends at max_train_steps, or after num_train_epochs.", "ignore_final_epochs"
        ),
        **_group(
            "Use checkpoint_step_interval.",
            "checkpoint_epoch_interval checkpointing_rolling_steps checkpoint_step_rolling_interval "
            "checkpoints_rolling_total_limit",
        ),
        **_group(
            "Remove it: checkpoints are always written to a temporary folder first.",
            "checkpointing_use_tempdir",
            harmless=("true",),
        ),
        **_group(
            "Remove it: nothing is uploaded. Upload the folder in output_dir yourself.",
            "push_to_hub push_checkpoints_to_hub push_to_hub_background hub_model_id hub_token "
            "model_card_note model_card_private model_card_safe_for_work modelspec_comment "
            "publishing_config post_upload_script post_checkpoint_script",
        ),
        **_group("Remove it: logs lie in output_dir.", "logging_dir"),
        **_group(
            "Use report_to: no webhook is called.",
            "webhook_config webhook_reporting_interval tracker_image_layout",
            harmless=("gallery",),
        ),
        **_group("Use validation_step_interval.", "validation_epoch_interval num_validation_epochs"),
        **_group(
            "Remove it: validation makes the pictures that validation_prompt and the prompt libraries name.",
            "validation_torch_compile validation_torch_compile_mode validation_method "
            "validation_external_script validation_external_background validation_preview "
            "validation_preview_steps validation_multigpu validation_batch_size validation_adapter_path "
            "validation_adapter_name validation_adapter_strength validation_adapter_mode "
            "validation_adapter_config validation_using_datasets validation_seed_source "
            "validation_disable_unconditional validation_lycoris_target validation_audio_only "
            "enable_watermark validation_stitch_input_location evaluation_type eval_steps_interval "
            "eval_epoch_interval eval_timesteps eval_dataset_id eval_dataset_pooling num_eval_images "
            "pretrained_evaluation_model_name_or_path",
            harmless=("simpletuner-local", "cpu"),
        ),
    }
)
"""Key of config.json -> why it is not a key here."""

DATASET_KEYS: Mapping[str, Unsupported] = MappingProxyType(
    {
        **_group(
            "Copy the data to a folder and give it as instance_data_dir.",
            "aws_bucket_name aws_region_name aws_endpoint_url aws_access_key_id aws_secret_access_key "
            "aws_data_prefix aws_max_pool_connections dataset_name split revision image_column streaming "
            "num_proc huggingface csv_file csv_cache_dir csv_url_column auto_load",
        ),
        **_group(
            "Write each caption into a text file beside its image and use caption_strategy textfile.",
            "parquet csv caption_column csv_caption_column fallback_caption_column caption_filter_list",
        ),
        **_group(
            "Put several captions into the text file, one per line; one is drawn each time.",
            "caption_shuffle",
        ),
        **_group(
            "Remove it: files are never deleted; what cannot be used is skipped and listed.",
            "delete_problematic_images delete_unwanted_images",
        ),
        **_group(
            "Remove it, and set minimum_image_size to leave small images out; large ones are only scaled "
            "down.",
            "maximum_image_size target_downsample_size minimum_aspect_ratio maximum_aspect_ratio",
        ),
        **_group("Use crop_aspect square or preserve.", "crop_aspect_buckets"),
        **_group(
            "Set aspect_bucket_alignment or aspect_bucket_rounding in config.json.",
            "aspect_bucket_alignment aspect_bucket_rounding",
        ),
        **_group("Set train_batch_size in config.json: all datasets share one.", "train_batch_size"),
        **_group(
            "Remove it: a dataset takes part in the whole run.",
            "start_epoch end_epoch start_step end_step",
            harmless=("1",),
        ),
        **_group(
            "Remove it: every image is trained on in the same way.",
            "is_regularisation_data is_regularization_data timestep_sampling_offset slider_strength",
        ),
        **_group(
            "Remove it: images have no conditioning here.",
            "conditioning_data conditioning_type conditioning_config conditioning source_dataset_id "
            "image_embeds instance_prompt_sampling audio video mask",
        ),
        **_group(
            "Remove it: there is one text cache. Name it by cache_dir_text, or by cache_dir of a "
            "text_embeds entry.",
            "text_embeds",
        ),
        **_group(
            "Remove it: caches are keyed by content and checked by themselves.",
            "vae_cache_clear_each_epoch skip_file_discovery vae_cache_disable text_cache_disable "
            "vae_cache_ondemand compress_cache compress_disk_cache disable_validation",
        ),
        **_group(
            "Remove it: caches are keyed by content and kept.",
            "metadata_backend preserve_data_backend_cache hash_filenames",
            harmless=("discovery", "json", "true"),
        ),
        **_group(
            _NO_NEED,
            "write_batch_size read_batch_size image_processing_batch_size max_workers num_workers tags "
            "aspect_bucket_worker_count torch_num_threads dataset_viewer",
        ),
    }
)
"""Key of a dataset -> why it is not a key here."""

LYCORIS_KEYS: Mapping[str, Unsupported] = MappingProxyType(
    {
        **_group(
            "Use apply_preset, which names the layers.", "preset target_module target_name unet_target_module"
        ),
        **_group("Use use_tucker.", "disable_conv_cp"),
        **_group(_REMOVE, "train_llm_adapter warn_on_unmatched init_lokr_norm"),
    }
)
"""Key of the lycoris json -> why it is not a key here."""

PRESET_KEYS: Mapping[str, Unsupported] = MappingProxyType(
    {
        **_group(
            "Remove it: adapter files have LyCORIS's own key layout.", "lora_prefix", harmless=("lycoris",)
        ),
        **_group(
            "Use target_module and target_name, which are about the denoiser.",
            "unet_target_module unet_target_name text_encoder_target_module text_encoder_target_name",
        ),
    }
)
"""Key of apply_preset -> why it is not a key here."""
