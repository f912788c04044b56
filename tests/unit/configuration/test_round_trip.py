"""Whatever is valid can be written and read again, as json types and as texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.schema.sections import RunConfig

if TYPE_CHECKING:
    from conftest import Workspace

# The workspace is written anew for every example.
SETTINGS = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Without braces, which name placeholders, and not blank, which would be no value.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="{}\x00"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text.strip().lower() not in ("none", "null")
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("none", "null")
)
COUNTS = st.integers(1, 10_000)
COUNTS_OR_ZERO = st.integers(0, 10_000)
RATES = st.floats(1e-9, 1e3)
SHARES = st.floats(0, 1)
SWITCHES = st.booleans()
SIZES = st.tuples(st.integers(1, 100), st.integers(1, 100)).map(lambda size: f"{8 * size[0]}x{8 * size[1]}")
BETAS = st.floats(0, 0.999)
PRECISIONS = st.sampled_from(["no_change", "int8-torchao", "fp8-torchao", "nf4-bnb"])
ROUTES = st.fixed_dictionaries(
    {
        "selection_ratio": st.floats(0.01, 0.99),
        "start_layer_idx": st.integers(0, 9),
        "end_layer_idx": st.integers(-9, -1) | st.integers(9, 20),
    }
)

CONFIG = {
    # SimpleTuner's learning_rate may lie below the lr_end that is drawn here.
    "defaults": st.just("ours"),
    "model_flavour": st.sampled_from(["small", "large"]),
    "model_type": st.just("lora"),  # full takes no adapter, which every example has
    "layer_filter": st.just([]),
    "fused_backward_pass": st.just(False),
    "pretrained_model_name_or_path": st.tuples(NAMES, NAMES).map("/".join),
    "pretrained_config_name_or_path": st.none(),
    "pretrained_unet_model_name_or_path": st.none() | st.tuples(NAMES, NAMES).map("/".join),
    "pretrained_unet_subfolder": st.none() | WORDS,
    "pretrained_transformer_model_name_or_path": st.none() | st.tuples(NAMES, NAMES).map("/".join),
    "pretrained_transformer_subfolder": st.none() | WORDS,
    "pretrained_t5_model_name_or_path": st.none() | st.tuples(NAMES, NAMES).map("/".join),
    "pretrained_vae_model_name_or_path": st.none() | st.tuples(NAMES, NAMES).map("/".join),
    "pretrained_vae_subfolder": st.none() | WORDS,
    "revision": st.none() | WORDS,
    "variant": st.none() | WORDS,
    "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
    "rescale_betas_zero_snr": SWITCHES,
    "max_token_length": st.sampled_from([75, 150, 225]),
    "lora_rank": COUNTS,
    "lora_alpha": RATES,
    "lora_dropout": st.floats(0, 0.99),
    "lora_init_type": st.sampled_from(["default", "gaussian"]),
    "use_dora": SWITCHES,
    "use_rslora": SWITCHES,
    "peft_lora_target_modules": st.lists(NAMES, min_size=1, max_size=3)
    | st.sampled_from([r".*attn\d\.to_[qkv]", "(a|b).*"]),
    "slider_lora_target": st.just(False),
    "flux_lora_target": st.none() | WORDS,
    "lora_format": st.just("diffusers"),
    "init_lora": st.none() | st.just("start.safetensors"),
    "max_train_steps": st.none() | COUNTS_OR_ZERO,
    "num_train_epochs": COUNTS,
    "train_batch_size": COUNTS,
    "gradient_accumulation_steps": COUNTS,
    "gradient_checkpointing": SWITCHES,
    "gradient_checkpointing_interval": st.none() | COUNTS,
    "allow_tf32": SWITCHES,
    "caption_dropout_probability": SHARES,
    "max_grad_norm": RATES,
    "grad_clip_method": st.sampled_from(["norm", "value"]),
    "regularisation_target": st.sampled_from(["base", "data"]),
    "prior_loss_weight": st.floats(0, 10),
    "tread_config": st.none() | st.fixed_dictionaries({"routes": st.lists(ROUTES, min_size=1, max_size=2)}),
    "optimizer": st.sampled_from(["adamw", "prodigy"]),
    "optimizer_config": st.fixed_dictionaries(
        {}, optional={"eps": RATES, "weight_decay": SHARES, "betas": st.lists(BETAS, min_size=2, max_size=2)}
    ),
    "lr_scheduler": st.sampled_from(
        ["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "sine"]
    ),
    "lr_warmup_steps": COUNTS_OR_ZERO,
    "lr_end": st.floats(0, 1e-4),
    "lr_power": RATES,
    "lr_num_cycles": RATES,
    "loss_type": st.sampled_from(["l2", "huber", "smooth_l1"]),
    # Others are refused without masks.
    "unmasked_weight": st.just(0.0),
    "normalize_masked_area_loss": st.just(False),
    "masked_loss_probability": st.just(1.0),
    "huber_c": st.floats(1e-9, 1),
    "huber_schedule": st.sampled_from(["snr", "exponential", "constant"]),
    "snr_gamma": RATES,
    "use_soft_min_snr": st.just(False),
    "soft_min_snr_sigma_data": RATES,
    "debiased_estimation_loss": SWITCHES,
    "offset_noise": SWITCHES,
    "noise_offset": RATES,
    "noise_offset_probability": SHARES,
    "multires_noise_iterations": COUNTS_OR_ZERO,
    "multires_noise_discount": st.floats(1e-9, 1),
    "input_perturbation": RATES,
    "input_perturbation_steps": COUNTS_OR_ZERO,
    "min_timestep": st.integers(0, 300),
    "max_timestep": st.integers(700, 1000),
    "timestep_bias_strategy": st.just("none"),
    "timestep_bias_multiplier": st.floats(1.5, 100),
    "timestep_bias_begin": st.integers(301, 400),
    "timestep_bias_end": st.integers(500, 699),
    "timestep_bias_portion": SHARES,
    "train_text_encoder": st.just(False),
    "text_encoder_lr": st.lists(RATES, max_size=2),
    "text_encoder_lora_rank": st.none() | COUNTS,
    "stop_text_encoder_training": st.none() | COUNTS,
    # A token comes with all or none of its keys: test_new_token_rules.py has it.
    "placeholder_token": st.none(),
    "initializer_token": st.none(),
    "num_vectors": st.just(1),
    "embedding_lr": st.none(),
    "use_ema": SWITCHES,
    "ema_decay": st.floats(0, 0.9999),
    "ema_update_interval": COUNTS,
    "ema_device": st.sampled_from(["cpu", "accelerator"]),
    "ema_validation": st.sampled_from(["none", "ema_only", "comparison"]),
    "ema_adapter_file": st.sampled_from(["plain", "main"]),
    "flow_sigmoid_scale": RATES,
    "flow_sigmoid_mean": st.floats(-3, 3),
    "flow_use_uniform_schedule": st.just(False),
    "flow_use_beta_schedule": st.just(False),
    "flow_use_mode_schedule": st.just(False),
    "flow_mode_schedule_scale": st.floats(-1, 1.75),
    "flow_cubic_schedule_weights": st.none() | st.lists(st.floats(0.1, 10), min_size=2, max_size=4),
    "flow_custom_timesteps": st.none(),
    "flow_timesteps_mode": st.sampled_from(["fixed-list", "round-robin"]),
    "flow_beta_schedule_alpha": RATES,
    "flow_beta_schedule_beta": RATES,
    "flow_schedule_shift": st.none() | st.floats(0, 10),
    "flow_schedule_auto_shift": st.just(False),
    "flux2_training_shift": st.just("sampling"),  # a key of one family
    "flux_guidance_mode": st.sampled_from(["constant", "random-range"]),
    "flux_guidance_value": RATES,
    "flux_guidance_min": st.floats(0, 1),
    "flux_guidance_max": st.floats(1, 10),
    "flux_attention_masked_training": SWITCHES,
    "mixed_precision": st.sampled_from(["bf16", "fp16", "no"]),
    "base_model_precision": st.just("no_change"),
    "text_encoder_1_precision": PRECISIONS,
    "text_encoder_2_precision": PRECISIONS,
    "text_encoder_3_precision": st.just("no_change"),
    "text_encoder_4_precision": st.just("no_change"),
    "enable_group_offload": st.just(False),
    "group_offload_type": st.sampled_from(["block_level", "leaf_level"]),
    "group_offload_blocks_per_group": COUNTS,
    "allow_cpu": SWITCHES,
    "skip_estimate": SWITCHES,
    # Others are refused with routes: test_compile_rules.py has them.
    "dynamo_backend": st.just("no"),
    "dynamo_mode": st.sampled_from(["default", "max-autotune-no-cudagraphs"]),
    "dynamo_use_regional_compilation": SWITCHES,
    "validation_torch_compile": st.just(False),
    "validation_torch_compile_mode": st.sampled_from(["default", "max-autotune-no-cudagraphs"]),
    "vae_batch_size": COUNTS,
    "vae_enable_tiling": SWITCHES,
    "vae_enable_slicing": SWITCHES,
    "resolution": st.floats(32, 4096),
    "resolution_type": st.sampled_from(["pixel", "pixel_area"]),
    "minimum_image_size": st.floats(0, 4096),
    "maximum_image_size": st.none() | st.floats(16, 4096),
    "target_downsample_size": st.none() | st.floats(4096, 16384),
    "max_upscale_threshold": st.none() | SHARES,
    "aspect_bucket_alignment": st.sampled_from([8, 16, 32]),
    "aspect_bucket_rounding": st.integers(0, 9),
    "caption_strategy": st.none() | st.sampled_from(["textfile", "filename", "instanceprompt"]),
    "caption_lines": st.sampled_from(["choose", "whole"]),
    "caption_variants": COUNTS,
    "eval_share": st.floats(0, 0.99),
    "eval_steps_interval": COUNTS_OR_ZERO,
    "eval_epoch_interval": COUNTS_OR_ZERO,
    "num_eval_images": COUNTS,
    "eval_timesteps": COUNTS,
    "eval_dataset_id": st.just([]),  # it names an entry, which every example has its own of
    "eval_loss_disable": SWITCHES,
    "conditioning_multidataset_sampling": st.sampled_from(["random", "combined"]),
    "cache_dir_vae": st.sampled_from(["latents", "{model_family}/latents", "{output_dir}/latents"]),
    "cache_dir_text": NAMES,
    "text_encoder_batch_size": COUNTS,
    "vae_cache_ondemand": SWITCHES,
    "text_cache_ondemand": SWITCHES,
    "vae_cache_disable": SWITCHES,
    "text_cache_disable": SWITCHES,
    "output_dir": st.sampled_from(["out", "out/{model_family}"]),
    "checkpoint_step_interval": COUNTS_OR_ZERO,
    "checkpoint_epoch_interval": COUNTS_OR_ZERO,
    "checkpoints_total_limit": st.none() | COUNTS,
    "resume_from_checkpoint": st.none() | st.sampled_from(["latest", "checkpoint-20"]),
    "report_to": st.lists(st.sampled_from(["wandb", "tensorboard", "trackio"]), unique=True),
    "tracker_project_name": WORDS,
    "tracker_run_name": st.none() | WORDS,
    "webhook_config": st.none() | st.just("webhooks.json"),
    "loader_timeout_seconds": st.floats(0, 1000),
    "text_cache_memory": st.floats(0, 64),
    "tracker_timeout_seconds": st.floats(0, 1000),
    "push_to_hub": st.just(False),
    "push_checkpoints_to_hub": SWITCHES,
    "hub_model_id": st.none() | NAMES | st.tuples(NAMES, NAMES).map("/".join),
    "model_card_private": SWITCHES,
    "model_card_safe_for_work": SWITCHES,
    "model_card_note": st.none() | WORDS,
    "validation_prompt": st.none() | WORDS,
    "validation_prompt_library": SWITCHES,
    "user_prompt_library": st.none() | st.just("prompts.json"),
    "validation_reference_images": st.just([]),  # others need a family that takes them
    "validation_negative_prompt": st.just("") | WORDS,
    "validation_resolution": st.lists(SIZES, max_size=3),
    "validation_guidance": RATES,
    "validation_guidance_real": RATES,
    "validation_guidance_rescale": SHARES,
    "validation_no_cfg_until_timestep": COUNTS_OR_ZERO,
    "validation_num_inference_steps": COUNTS,
    "validation_seed": st.none() | st.integers(-(2**40), 2**40),
    "validation_noise_scheduler": st.none() | st.sampled_from(["ddim", "euler", "dpm++", "unipc"]),
    "num_validation_images": COUNTS,
    "validation_step_interval": COUNTS_OR_ZERO,
    "validation_epoch_interval": COUNTS_OR_ZERO,
    "validation_on_startup": SWITCHES,
    "validation_disable": SWITCHES,
    "disable_benchmark": SWITCHES,
    "evaluation_type": st.sampled_from(["none", "clip"]),
    "pretrained_evaluation_model_name_or_path": st.just("clip/other"),
    "validation_compared_config": st.none() | st.just("other.json"),
    "validation_lycoris_strength": st.floats(-4, 4),
}
# What every example has; the rest of the keys come and go.
ALWAYS = {
    "model_family": st.just("toy"),
    "seed": st.integers(0, 2**63 - 1),  # SimpleTuner's defaults draw one
    "learning_rate": st.floats(1e-3, 1e3),
    "instance_prompt": WORDS,
    "lora_type": st.sampled_from(["standard", "lycoris"]),
    "lycoris_config": st.just("lycoris.json"),
    "data_backend_config": st.just("data.json"),
}
DATASET = {
    "type": st.just("local"),
    "dataset_type": st.just("image"),
    "disabled": st.just(False),
    "cache_dir_vae": st.sampled_from(["own", "own/{id}", "{output_dir}/{id}"]),
    "resolution": st.floats(32, 4096),
    "resolution_type": st.sampled_from(["pixel", "pixel_area"]),
    "minimum_image_size": st.floats(0, 4096),
    "maximum_image_size": st.floats(16, 4096),
    "target_downsample_size": st.floats(4096, 16384),
    "max_upscale_threshold": SHARES,
    "eval_share": st.floats(0, 0.99),
    "is_regularisation_data": st.just(False),  # alone it is refused
    "crop": SWITCHES,
    "random_flip": SWITCHES,
    "vae_cache_clear_each_epoch": st.just(False),  # true is for random crops alone
    "crop_style": st.sampled_from(["random", "center", "centre", "corner"]),
    "crop_aspect": st.sampled_from(["square", "preserve"]),
    "crop_aspect_buckets": st.lists(st.floats(0.1, 10), max_size=3)
    | st.floats(0, 1).map(
        lambda weight: [{"aspect": 0.5, "weight": weight}, {"aspect": 2.0, "weight": 1 - weight}]
    ),
    "caption_strategy": st.sampled_from(["textfile", "filename", "instance_prompt"]),
    "caption_lines": st.sampled_from(["choose", "whole"]),
    "instance_prompt": WORDS,
    "prepend_instance_prompt": SWITCHES,
    "only_instance_prompt": SWITCHES,
    "caption_filter_list": st.lists(st.sampled_from(["a photo of", "s/cat/dog/", "^this .* is"]), max_size=3),
    "caption_prefix": WORDS,
    "caption_suffix": WORDS,
    "enable_wildcard": SWITCHES,
    "caption_shuffle": st.fixed_dictionaries(
        {},
        optional={
            "enable": SWITCHES,
            "count": COUNTS,
            "seed": st.none() | st.integers(0, 2**63 - 1),
            "split_on": st.sampled_from(["comma", "space", "period"]),
            "position_start": COUNTS_OR_ZERO,
            "keep_separator": st.none() | WORDS,
            "include_original": SWITCHES,
        },
    ),
    "alpha_mask": SWITCHES,
    "conditioning_data": st.just([]),  # an id needs an entry of masks
    "conditioning": st.just([]),  # these need a family that edits
    "caption_tag_dropout_rate": SHARES,
    "caption_dropout_probability": st.none() | SHARES,
    "repeats": COUNTS_OR_ZERO,
    "train_batch_size": st.none() | COUNTS_OR_ZERO,
    "start_step": st.sampled_from([0, 1]),
    "end_step": st.none() | st.just(0),
    "start_epoch": st.sampled_from([0, 1]),
    "end_epoch": st.none() | st.just(0),
    "probability": RATES,
    "max_num_samples": st.none() | COUNTS_OR_ZERO,
    "slider_strength": st.none() | st.just(0),
}
LYCORIS = {
    "tlora_min_rank": st.integers(1, 8) | st.floats(0.01, 0.99),
    "tlora_scale": st.sampled_from(["rank", "active"]),
    "tlora_alpha": RATES,
    "tlora_schedule": st.sampled_from(["floor", "inclusive"]),
    "tlora_init": st.sampled_from(["random", "weight", "vanilla"]),
    "sig_type": st.sampled_from(["last", "middle", "principal"]),
    "conv_dim": COUNTS,
    "apply_preset": st.fixed_dictionaries(
        {},
        optional={
            "target_module": st.lists(NAMES, max_size=2),
            "enable_conv": SWITCHES,
            "target_name": NAMES,
        },
    ),
}

CONFIGS = st.fixed_dictionaries(ALWAYS, optional=CONFIG)
ROWS = {
    "split": WORDS,
    "revision": st.none() | WORDS,
    "image_column": WORDS,
    "caption_column": WORDS | st.lists(WORDS, max_size=2),
    "fallback_caption_column": st.none() | WORDS,
    "row_filter": st.dictionaries(
        WORDS, WORDS | st.lists(COUNTS, min_size=1) | st.fixed_dictionaries({"min": RATES}), max_size=2
    ),
    "streaming": st.just(False),
}
HUB = {"id": NAMES, "type": st.just("huggingface"), "dataset_name": st.just("owner/name")}
DATASETS = st.lists(
    st.fixed_dictionaries({"id": NAMES}, optional=DATASET) | st.fixed_dictionaries(HUB, optional=ROWS),
    min_size=1,
    max_size=3,
    unique_by=lambda d: d["id"],
)
LYCORIS_FILES = st.fixed_dictionaries(
    {
        "algo": st.just("tlora"),
        "multiplier": st.floats(0.01, 4),
        "linear_dim": st.integers(8, 64),
        "linear_alpha": RATES,
    },
    optional=LYCORIS,
)


@pytest.fixture
def loaded(workspace: Workspace) -> Iterator[Callable[..., RunConfig]]:
    """Loads a whole configuration."""
    workspace.text("start.safetensors", "")
    workspace.text("webhooks.json", '{"webhook_type": "raw", "webhook_url": "https://a.example/b"}')
    workspace.text("prompts.json", '{"one": "a dog", "two": {"prompt": "a bird", "adapter_strength": 0.5}}')

    def load(
        config: dict[str, object], lycoris: dict[str, object], datasets: list[dict[str, object]]
    ) -> RunConfig:
        workspace.config, workspace.lycoris = config, lycoris
        workspace.datasets = [
            dataset if "dataset_name" in dataset else {"instance_data_dir": "images"} | dataset
            for dataset in datasets
        ]
        other = {key.removeprefix("--"): value for key, value in config.items()}
        other |= {"output_dir": "output of the other", "lora_init_type": "default"}
        workspace.text("other.json", json.dumps(other | {"validation_compared_config": None}))
        return workspace.load()

    return load


def test_every_key_takes_part_in_the_round_trip() -> None:
    assert KEYS.owners.keys() == CONFIG.keys() | ALWAYS.keys()


def _same(first: RunConfig, second: RunConfig) -> None:
    paths = {"data": {"data_backend_config"}, "adapter": {"lycoris_config"}}
    for name in RunConfig.model_fields.keys() - {"source", "decisions", "differing_defaults"}:
        leaving_out = paths.get(name)
        if leaving_out is None:
            assert vars(first)[name] == vars(second)[name], name
        else:
            assert vars(first)[name].model_dump(exclude=leaving_out) == vars(second)[name].model_dump(
                exclude=leaving_out
            )


@settings(SETTINGS)
@given(CONFIGS, LYCORIS_FILES, DATASETS)
@pytest.mark.reliability_row(32)
def test_a_resolved_configuration_reads_back_as_itself(
    workspace: Workspace,
    loaded: Callable[..., RunConfig],
    config: dict[str, object],
    lycoris: dict[str, object],
    datasets: list[dict[str, object]],
) -> None:
    first = loaded(config, lycoris, datasets)
    path = workspace.text("resolved.json", json.dumps(first.resolved()))
    second = workspace.load_as_written(path=path)
    _same(first, second)
    assert second.resolved() == first.resolved()


def _as_text(value: object) -> object:
    if isinstance(value, dict):
        return {key: _as_text(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_as_text(each) for each in value]
    if value is None:
        return value
    return value if isinstance(value, str) else json.dumps(value)


@settings(SETTINGS, max_examples=300)
@given(CONFIGS, LYCORIS_FILES, DATASETS)
@pytest.mark.reliability_row(32)
def test_values_written_as_texts_mean_the_same(
    loaded: Callable[..., RunConfig],
    config: dict[str, object],
    lycoris: dict[str, object],
    datasets: list[dict[str, object]],
) -> None:
    first = loaded(config, lycoris, datasets)
    dashed = {f"--{key}": _as_text(value) for key, value in config.items()}
    second = loaded(dashed, _as_text(lycoris), _as_text(datasets))
    for name in RunConfig.model_fields.keys() - {"lycoris", "compared_with", "decisions"}:
        assert vars(first)[name] == vars(second)[name], name
    if first.lycoris is not None:
        assert second.lycoris is not None
        assert second.lycoris.model_dump(exclude={"raw"}) == first.lycoris.model_dump(exclude={"raw"})
