"""SimpleTuner's spellings become ours, and its keys without effect are accepted where they change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from simpletuner.helpers.configuration.load import KEYS
from simpletuner.helpers.configuration.loading import translation as module
from simpletuner.helpers.configuration.loading.dataset_file import TextCacheEntry
from simpletuner.helpers.configuration.loading.relations import RELATIONS, Context
from simpletuner.helpers.configuration.loading.translation import FUNCTIONS, File, tables
from simpletuner.helpers.configuration.loading.unsupported_keys import unsupported_keys
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig, TargetPreset
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from conftest import Workspace

    from simpletuner.helpers.configuration.schema.sections import RunConfig

TABLE = Path(module.__file__).with_suffix(".json")
OWNED: dict[File, set[str]] = {
    "config.json": set(KEYS.owners),
    "dataset": set(DatasetConfig.model_fields),
    "text_embeds": set(TextCacheEntry.model_fields),
    "lycoris": set(LycorisConfig.model_fields),
    "apply_preset": set(TargetPreset.model_fields),
}


@pytest.fixture
def flux(workspace: Workspace) -> Workspace:
    workspace.families = registry.specs()
    workspace.config |= {"model_family": "flux"}
    workspace.config.pop("model_flavour", None)
    return workspace


@pytest.fixture
def sdxl(flux: Workspace) -> Workspace:
    flux.config |= {"model_family": "sdxl"}
    return flux


def decided(run: RunConfig) -> dict[str, tuple[str, str]]:
    """Key -> (outcome, ours)."""
    return {each.key: (each.outcome, each.ours) for each in run.decisions}


def idle(run: RunConfig) -> set[str]:
    return {each.key for each in run.decisions if each.outcome == "no effect"}


def test_no_key_of_the_schema_stands_among_those_without_effect_or_among_the_refused() -> None:
    offenders = []
    for file, owned in OWNED.items():
        table = tables(file)
        offenders += [(file, key) for key in owned if any(table.without_effect(key))]
        offenders += [(file, key) for key in table.aliases if key in owned]
        offenders += [(file, key) for key in table.arguments if key in owned]
        offenders += [(file, key) for entry in table.owned for key in entry.keys if key not in owned]
        offenders += [(file, key) for key in table.aliases.values() if key not in owned]
    assert not offenders


def test_a_key_that_is_refused_at_some_value_has_advice() -> None:
    lacking = []
    for file in ("config.json", "dataset"):
        refused = unsupported_keys(file)
        for entry in tables(file).no_effect:
            conditional = bool(entry.values or entry.relation)
            lacking += [key for key in entry.keys if conditional and key not in refused]
            always = not (entry.values or entry.relation or entry.without)
            lacking += [key for key in entry.keys if always and key in refused]
    assert not lacking


def test_every_entry_of_the_table_has_a_sentence_and_names_what_exists() -> None:
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    assert set(get_args(File)) <= content.keys()
    entries = [entry for file in get_args(File) for section in content[file].values() for entry in section]
    assert len(entries) > 100
    assert not [entry for entry in entries if not entry["text"].endswith(".")]
    assert not [entry for entry in entries if entry.get("relation", next(iter(RELATIONS))) not in RELATIONS]
    assert not [entry for entry in entries if entry.get("function", next(iter(FUNCTIONS))) not in FUNCTIONS]
    assert not [value for entry in entries for value in entry.get("values", ()) if value != value.lower()]
    used = {entry.get("relation") for entry in (*entries, *content["defaults"])}
    assert used - {None} == RELATIONS.keys()


def test_a_lycoris_json_of_a_standard_adapter_is_not_read(workspace: Workspace) -> None:
    run = workspace.load(lora_type="standard", lycoris_config="config/no_such_file.json")
    assert idle(run) == {"lycoris_config"}
    assert "lycoris_config" in workspace.problems(lora_type="lycoris")


@pytest.mark.parametrize("key", ["optimizer", "--optimizer"])
def test_adamw_bf16_is_adamw_with_its_arguments(workspace: Workspace, key: str) -> None:
    run = workspace.load(**{key: "adamw_bf16", "optimizer_config": "weight_decay=0.1"})
    assert run.optimizer.optimizer == "adamw"
    assert run.optimizer.optimizer_config == {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
    assert decided(run)["optimizer"] == ("translated", 'optimizer: "adamw"')


@pytest.mark.parametrize("name", ["adamw-bf16", "torch-adamw", "optimi-adamw", "AdamW"])
def test_other_names_of_adamw(workspace: Workspace, name: str) -> None:
    run = workspace.load(optimizer=name)
    assert run.optimizer.optimizer == "adamw"
    assert bool(run.optimizer.optimizer_config) == (name in ("adamw-bf16", "optimi-adamw"))


def test_the_command_line_s_optimiser_does_not_get_the_arguments_of_the_file_s(workspace: Workspace) -> None:
    run = workspace.load("optimizer=prodigy", optimizer="adamw_bf16")
    assert run.optimizer.optimizer == "prodigy"
    assert not run.optimizer.optimizer_config


def test_a_name_that_stays_is_no_decision(workspace: Workspace) -> None:
    assert not workspace.load(optimizer="adamw", seed=3).decisions


def test_single_arguments_go_into_optimizer_config(workspace: Workspace) -> None:
    run = workspace.load(adam_weight_decay="0.2", optimizer_beta2=0.98, optimizer_config="eps=1e-7")
    assert run.optimizer.optimizer_config == {"betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.2}
    assert decided(run)["optimizer_beta2"] == ("translated", "optimizer_config: beta2=0.98")


def test_a_single_argument_that_the_optimizer_lacks_has_no_effect(workspace: Workspace) -> None:
    run = workspace.load(optimizer="lion", adam_beta1=0.8, adam_epsilon=1e-8)
    assert run.optimizer.optimizer_config == {"betas": (0.8, 0.99)}
    assert decided(run)["adam_epsilon"][0] == "no effect"
    run = workspace.load(optimizer="adafactor")
    assert run.optimizer.optimizer_config == {}
    assert decided(run)["adam_beta1"][0] == "no effect"


def test_an_argument_that_contradicts_optimizer_config_is_an_error(workspace: Workspace) -> None:
    message = workspace.problems(adam_epsilon=1e-8, optimizer_config={"eps": 1e-6})
    assert "adam_epsilon" in message
    assert "optimizer_config" in message
    assert workspace.load(adam_epsilon=1e-6).optimizer.optimizer_config == {"eps": 1e-6}


def test_use_prodigy_optimizer_names_prodigy(workspace: Workspace) -> None:
    assert workspace.load(use_prodigy_optimizer="true").optimizer.optimizer == "prodigy"
    assert workspace.load(use_prodigy_optimizer=False).optimizer.optimizer == "adamw"


@pytest.mark.parametrize(
    ("key", "theirs", "ours", "outcome"),
    [
        ("base_model_precision", "int8-quanto", "int8-torchao", "translated"),
        ("base_model_precision", "int8-sdnq", "int8-torchao", "translated"),
        ("base_model_precision", "fp8-quanto", "fp8-torchao", "translated"),
        ("base_model_precision", "int4-quanto", "nf4-bnb", "approximate"),
        ("text_encoder_2_precision", "nf4", "nf4-bnb", "approximate"),
        ("report_to", "simpletuner", None, "translated"),
    ],
)
def test_values_with_another_name(
    workspace: Workspace, key: str, theirs: str, ours: str | None, outcome: str
) -> None:
    run = workspace.load(**{key: theirs})
    assert run.resolved()[key] == (ours if ours is not None else [])
    assert decided(run)[key][0] == outcome


def test_a_format_without_an_equal_is_refused_with_the_nearest(workspace: Workspace) -> None:
    assert "nf4-bnb" in workspace.problems(base_model_precision="int2-quanto")


def test_tf32_is_off_where_either_key_says_so(workspace: Workspace) -> None:
    assert workspace.load(disable_tf32=True).precision.allow_tf32 is False
    assert "disable_tf32" in workspace.problems(allow_tf32=True)
    assert workspace.load(disable_tf32=None).precision.allow_tf32 is True


def test_all_trackers_are_those_that_are_installed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workspace.load(report_to="all").tracking.report_to == ("wandb", "tensorboard")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert workspace.load(report_to="all").tracking.report_to == ("wandb",)


def test_the_older_name_of_the_shift_by_tokens(flux: Workspace) -> None:
    assert flux.load(flux_schedule_auto_shift=True).noise.flow_schedule_auto_shift


def test_two_names_of_one_key_may_agree_but_not_differ(workspace: Workspace) -> None:
    assert (
        workspace.load(validation_steps=7, validation_step_interval="7").validation.validation_step_interval
        == 7
    )
    message = workspace.problems(validation_steps=8)
    assert "validation_steps" in message
    assert "validation_step_interval" in message


def test_an_alias_on_the_command_line_wins_over_the_name_in_the_file(workspace: Workspace) -> None:
    run = workspace.load("--validation_steps=9", validation_step_interval=7)
    assert run.validation.validation_step_interval == 9


@pytest.mark.parametrize(
    "key", ["lr_warmup_steps", "train_batch_size", "validation_noise_scheduler", "cache_dir"]
)
def test_an_empty_text_is_left_out(workspace: Workspace, key: str) -> None:
    run = workspace.load(**{key: ""})
    assert idle(run) == {key}
    assert run.optimizer.lr_warmup_steps == 0
    assert run.training.train_batch_size == 1


def test_a_key_without_effect_is_no_value_of_the_argument_before_it(workspace: Workspace) -> None:
    assert "tracker_run_name" in workspace.problems("--tracker_run_name", "quantize_via=cpu")
    assert "tracker_run_name" in workspace.problems("--tracker_run_name", "adam_beta1=0.8")
    assert workspace.load("--tracker_run_name", "a=b").tracking.tracker_run_name == "a=b"


def test_an_empty_text_stays_where_it_is_a_text(workspace: Workspace) -> None:
    run = workspace.load(validation_negative_prompt="", resume_from_checkpoint="")
    assert run.checkpoint.resume_from_checkpoint is None
    assert not run.decisions


@pytest.mark.parametrize(
    "changes",
    [
        {"write_batch_size": 128, "max_workers": "32", "torch_num_threads": 8, "aws_max_pool_connections": 1},
        {"compress_disk_cache": True, "keep_vae_loaded": True, "quantize_via": "pipeline"},
        {"disable_tf32": False, "set_grads_to_none": True, "i_know_what_i_am_doing": True},
        {"base_model_default_dtype": "bf16", "inference_scheduler_timestep_spacing": "trailing"},
        {"gradient_checkpointing_backend": "torch", "eval_dataset_pooling": True, "grounding": False},
        {"validation_disable_unconditional": False, "accelerate_extra_args": "--x", "smoldit": "false"},
        {"scheduled_sampling_sampler": "unipc", "scheduled_sampling_max_step_offset": 0},
        {"sdnq_group_size": 64, "sdnq_use_svd": True, "delete_problematic_images": "true"},
        {"layersync_lambda": 0.2, "nextlat_weight": 0.1, "nextlat_state_loss": "smooth_l1"},
        {"fsdp_version": 2, "xm_candidate_count": 1, "nsfw_check_min_votes": 2, "ramtorch_vae": False},
        {"crepa_lambda": 0.5, "crepa_enabled": False, "urepa_model": "dinov2_vitg14"},
        {"ideogram_schedule_std": 1.5, "validation_num_video_frames": 49, "_comment": "mine"},
        {"prodigy_steps": 100, "vae_dtype": "bf16"},
    ],
    ids=range(13),
)
def test_keys_that_ask_for_nothing_here_are_accepted(
    workspace: Workspace, changes: dict[str, object]
) -> None:
    run = workspace.load(**changes)
    assert idle(run) == changes.keys()
    assert not changes.keys() & run.resolved().keys()


@pytest.mark.parametrize(
    ("key", "value", "beside"),
    [
        ("base_model_default_dtype", "fp32", {"base_model_precision": "int8-torchao"}),
        ("inference_scheduler_timestep_spacing", "leading", {}),
        ("gradient_checkpointing_backend", "unsloth", {}),
        ("attention_mechanism", "sageattention", {}),
        ("layersync_lambda", 0.2, {"layersync_enabled": True}),
        ("crepa_adjacent_tau", 2.0, {"crepa_enabled": True}),
        ("prodigy_steps", 100, {"optimizer": "prodigy"}),
        ("vae_dtype", "fp32", {}),
    ],
)
def test_the_same_keys_are_refused_where_they_would_change_the_run(
    workspace: Workspace, key: str, value: object, beside: dict[str, object]
) -> None:
    message = workspace.problems(**{key: value}, **beside)
    assert f"  {key} " in message


def test_keys_of_another_kind_of_model_have_no_effect(flux: Workspace) -> None:
    run = flux.load(snr_gamma=5, t5_padding="unmodified", pretrained_unet_subfolder="unet")
    assert idle(run) == {"snr_gamma", "t5_padding", "pretrained_unet_subfolder"}
    assert run.noise.snr_gamma is None


def test_no_real_guidance_makes_its_start_idle(flux: Workspace) -> None:
    assert "validation_no_cfg_until_timestep" in idle(flux.load(validation_no_cfg_until_timestep=2))
    run = flux.load(validation_guidance_real=3.0)
    assert "validation_no_cfg_until_timestep" not in idle(run)
    assert run.validation.validation_no_cfg_until_timestep == 2


def test_every_layer_of_flux_is_the_default_of_other_families(flux: Workspace) -> None:
    assert "flux_lora_target" in idle(flux.load(model_family="flux2", flux_lora_target="all"))
    assert "flux_lora_target" in flux.problems(flux_lora_target="mmdit")
    assert (
        "controlnet"
        not in flux.problems(model_family="flux", flux_lora_target="controlnet").partition("mean")[2]
    )


def test_keys_of_transformers_have_no_effect_on_a_unet(sdxl: Workspace) -> None:
    run = sdxl.load(flux_lora_target="mmdit", flux_guidance_value=3.5, flow_schedule_shift=3)
    assert idle(run) == {"flux_lora_target", "flux_guidance_value", "flow_schedule_shift"}
    assert "flow_use_uniform_schedule" in sdxl.problems(flow_use_uniform_schedule=True)


def test_group_offload_of_a_unet_is_leaf_level(sdxl: Workspace) -> None:
    run = sdxl.load(enable_group_offload=True)
    assert run.precision.group_offload_type == "leaf_level"
    assert decided(run)["enable_group_offload"][1] == "group_offload_type: leaf_level"
    assert sdxl.load(enable_group_offload=False).precision.group_offload_type == "block_level"
    assert "group_offload_type" in sdxl.problems(enable_group_offload=True, group_offload_type="block_level")


def test_group_offload_of_a_transformer_stays_block_level(flux: Workspace) -> None:
    assert flux.load(enable_group_offload=True).precision.group_offload_type == "block_level"


@pytest.mark.parametrize(("flavour", "says"), [("libreflux", "LibreFlux"), ("fluxbooru", "FluxBooru")])
def test_flavours_that_are_not_here_name_what_to_do(flux: Workspace, flavour: str, says: str) -> None:
    assert says in flux.problems(model_flavour=flavour)


def test_kontext_is_a_flavour(flux: Workspace) -> None:
    assert flux.load(model_flavour="kontext").model.model_flavour == "kontext"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("1.0", "1024x1024"), (1, "1024x1024"), ("310x312,512", "304x304,512x512"), ("768.0", "768x768")],
)
def test_sizes_of_validation_images_are_those_that_are_made(
    flux: Workspace, theirs: object, ours: str
) -> None:
    run = flux.load(validation_resolution=theirs)
    assert ",".join(map(str, run.validation.validation_resolution)) == ours
    assert "validation_resolution" in decided(run)


@pytest.mark.parametrize("size", ["1024x768", 64, "512"])
def test_a_size_that_fits_is_no_decision(flux: Workspace, size: object) -> None:
    assert not flux.load(validation_resolution=size).decisions


@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-torchao"])
def test_a_lokr_without_rank_and_bypass_mode_is_completed(workspace: Workspace, precision: str) -> None:
    workspace.lycoris = {"algo": "lokr", "multiplier": 1.0, "linear_alpha": 1, "factor": 16}
    run = workspace.load(base_model_precision=precision)
    assert run.lycoris is not None
    assert run.lycoris.linear_dim == 10_000
    assert run.lycoris.extra["bypass_mode"] is True
    assert run.resolved()["lycoris_config"] == workspace.lycoris | {"linear_dim": 10_000, "bypass_mode": True}
    assert {"linear_dim", "bypass_mode"} <= decided(run).keys()
    plain = workspace.load(base_model_precision="no_change").lycoris
    assert plain is not None
    assert "bypass_mode" not in plain.extra


def test_a_rank_is_still_required_of_a_lora(workspace: Workspace) -> None:
    workspace.lycoris = {"algo": "lora", "multiplier": 1.0, "linear_alpha": 1}
    assert "linear_dim" in workspace.problems()


IMAGES = {"id": "photos", "instance_data_dir": "images"}


@pytest.mark.parametrize(
    "changes",
    [
        {"write_batch_size": 128, "cache_file_suffix": "x", "text_embeds": "t", "skip_file_discovery": "vae"},
        {"metadata_backend": "discovery", "preserve_data_backend_cache": True, "ignore_epochs": True},
        {"vae_cache_clear_each_epoch": True},
    ],
    ids=range(3),
)
def test_keys_of_a_dataset_that_ask_for_nothing(workspace: Workspace, changes: dict[str, object]) -> None:
    workspace.datasets = [IMAGES | changes]
    assert idle(workspace.load()) == {f"photos.{key}" for key in changes}


def test_a_random_crop_makes_a_cleared_cache_a_feature(workspace: Workspace) -> None:
    random_crop = {"vae_cache_clear_each_epoch": True, "crop": True}
    workspace.datasets = [IMAGES | random_crop]
    run = workspace.load()
    assert idle(run) == set()
    assert [dataset.vae_cache_clear_each_epoch for dataset in run.datasets] == [True]
    workspace.datasets = [IMAGES | random_crop | {"dataset_type": "eval"}, IMAGES | {"id": "trained"}]
    assert "photos.vae_cache_clear_each_epoch" in workspace.problems()
    workspace.datasets = [IMAGES | random_crop | {"crop_style": "center"}]
    assert idle(workspace.load()) == {"photos.vae_cache_clear_each_epoch"}


def test_entries_of_caches_are_read_like_simpletuner_s(workspace: Workspace) -> None:
    workspace.datasets = [
        IMAGES,
        {"id": "t", "dataset_type": "text_embeds", "default": True, "cache_dir": "", "write_batch_size": 1},
        {"id": "v", "dataset_type": "image_embeds", "type": "local", "cache_dir": "cache/vae"},
    ]
    run = workspace.load()
    assert [dataset.id for dataset in run.datasets] == ["photos"]
    assert idle(run) == {"t.cache_dir", "t.write_batch_size", "v.dataset_type"}


def test_a_relation_reads_texts_and_numbers() -> None:
    for value in ("1.0", 1, 0.5):
        context = Context({"validation_guidance_real": value, "crop": "true"})
        assert RELATIONS["validation_guidance_real of 1 or less"]("", context)
    assert not RELATIONS["validation_guidance_real of 1 or less"](
        "", Context({"validation_guidance_real": "2"})
    )
    assert not RELATIONS["no random crop"]("vae_cache_clear_each_epoch", context)


def test_the_address_of_a_dataset_is_no_repository(workspace: Workspace) -> None:
    message = workspace.problems(hub_model_id="https://huggingface.co/datasets/me/cat")
    assert "hub_model_id" in message
    run = workspace.load(hub_model_id="https://huggingface.co/me/cat/tree/main")
    assert decided(run)["hub_model_id"] == ("translated", 'hub_model_id: "me/cat"')
