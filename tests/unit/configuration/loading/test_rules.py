"""Rules between sections, and between them and the model family."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prediction_type": "flow_matching"}, '"flow_matching": .*v_prediction, epsilon'),
        ({"prediction_type": "epsilonn"}, '"epsilonn": .*Did you mean epsilon'),
        ({"model_flavour": "lrge"}, '"lrge": .*small, large.*Did you mean large'),
        ({"model_flavour": "lrge", "pretrained_model_name_or_path": "a/b"}, '"lrge": .*small, large'),
        ({"aspect_bucket_alignment": 12}, "12: .*multiple of 8.* 32"),
        ({"resolution": 24}, "24 is 24 px, .*aspect_bucket_alignment 32"),
        ({"validation_resolution": "100x64"}, "100x64: .*multiples of 8.* 104x64"),
        ({"validation_resolution": "64x100"}, "64x100: .*multiples of 8.* 64x104"),
    ],
)
def test_what_the_family_does_not_have_is_refused(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    key = next(iter(changes))
    assert re.fullmatch(f"config.json: 1 problem\n  {key}  {text}.*", workspace.problems(**changes))


QUANTISED = ("int8-torchao", "fp8-torchao", "nf4-bnb")
OFFLOAD = {"enable_group_offload": True, "group_offload_type": "leaf_level", "gradient_checkpointing": True}


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_text_encoder_that_the_family_has_not_cannot_be_quantised(
    workspace: Workspace, precision: str
) -> None:
    assert workspace.load(text_encoder_2_precision=precision).precision.text_encoder_2_precision == precision
    message = workspace.problems(text_encoder_3_precision=precision)
    assert f'text_encoder_3_precision  "{precision}": toy has 2 text encoders. Remove it.' in message


@pytest.mark.parametrize("key", ["base_model_precision", "text_encoder_4_precision"])
def test_other_formats_are_recognised_and_refused_with_advice(workspace: Workspace, key: str) -> None:
    message = workspace.problems(**{key: "int2-quanto"})
    assert '"int2-quanto": known from SimpleTuner, not supported here.' in message
    assert "int8-torchao" in message.partition("not supported here.")[2]


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize(
    ("lycoris", "text"),
    [
        ({"algo": "tlora"}, None),
        ({"algo": "tlora", "tlora_init": "weight"}, None),
        ({"algo": "loha", "bypass_mode": True}, None),
        ({"algo": "loha"}, None),
        ({"algo": "loha", "bypass_mode": False}, "algo loha .*bypass_mode"),
        ({"algo": "full"}, "algo full .*tlora, lora, locon, loha, lokr"),
        ({"algo": "ia3", "bypass_mode": True}, "algo ia3 .*tlora"),
        ({"algo": "dylora"}, "algo dylora .*tlora"),
        ({"algo": "lora", "dora_wd": True}, "algo lora with weight_decompose"),
        (
            {"algo": "tlora", "apply_preset": {"module_algo_map": {"Attention": {"algo": "lokr"}}}},
            "algo lokr .*bypass_mode",
        ),
        (
            {
                "algo": "lora",
                "bypass_mode": True,
                "apply_preset": {"name_algo_map": {"a": {"bypass_mode": False}}},
            },
            "algo lora .*bypass_mode",
        ),
    ],
)
def test_adapters_that_need_whole_weights_are_refused_on_a_quantised_denoiser(
    workspace: Workspace, precision: str, lycoris: dict[str, object], text: str | None
) -> None:
    workspace.lycoris = {"multiplier": 1.0, "linear_dim": 8, "linear_alpha": 8, **lycoris}
    # LyCORIS knows bitsandbytes' layers by their class and sets bypass_mode for them.
    if text is None or (precision == "nf4-bnb" and "bypass_mode" in text):
        assert workspace.load(base_model_precision=precision).precision.base_model_precision == precision
    else:
        assert re.search(text, workspace.problems(base_model_precision=precision))
    workspace.load(base_model_precision="no_change")


@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_a_lora_that_begins_by_changing_the_base_is_refused_on_a_quantised_one(
    workspace: Workspace, precision: str, start: str
) -> None:
    workspace.config |= {"lora_type": "standard", "lora_init_type": start}
    message = workspace.problems(base_model_precision=precision)
    assert f"lora_init_type  {start}: " in message
    assert f"base_model_precision {precision}" in message
    workspace.load(base_model_precision=precision, lora_init_type="gaussian")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"group_offload_type": "block_level"}, "group_offload_type  block_level"),
        ({"gradient_checkpointing": False}, "enable_group_offload  true: needs gradient_checkpointing"),
        ({"gradient_checkpointing_interval": 2}, "gradient_checkpointing_interval  2: "),
        ({"base_model_precision": "nf4-bnb"}, "nf4-bnb layers stay on the device."),
        ({"group_offload_use_stream": True}, "group_offload_use_stream  known from"),
    ],
)
def test_offload_that_cannot_train_is_refused(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    workspace.load(**OFFLOAD, base_model_precision="int8-torchao", group_offload_use_stream=False)
    assert text in workspace.problems(**{**OFFLOAD, **changes})


def test_blocks_of_a_transformer_may_stay_on_the_host(workspace: Workspace) -> None:
    workspace.families = {"toy": replace(workspace.families["toy"], denoiser_name="transformer")}
    assert workspace.load(enable_group_offload=True).precision.group_offload_type == "block_level"


def test_what_the_family_has_is_accepted(workspace: Workspace) -> None:
    config = workspace.load(
        prediction_type="epsilon", aspect_bucket_alignment=8, validation_resolution="104x64"
    )
    assert config.model.prediction_type == "epsilon"
    assert config.data.aspect_bucket_alignment == 8


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"resolution": 512}, "512x512"),
        ({"resolution": 520}, "512x512"),
        ({"resolution": 530}, "544x544"),
        ({"resolution": 530, "aspect_bucket_alignment": 8}, "528x528"),
        ({"resolution": 1.0, "resolution_type": "area"}, "992x992"),
        ({"resolution_type": "area"}, "512x512"),
    ],
)
def test_validation_pictures_have_the_training_resolution(
    workspace: Workspace, changes: dict[str, object], size: str
) -> None:
    assert [str(each) for each in workspace.load(**changes).validation.validation_resolution] == [size]


def test_a_flavour_goes_unnamed_with_a_model_of_the_users_own(workspace: Workspace) -> None:
    assert workspace.load(pretrained_model_name_or_path="me/mine").model.model_flavour is None


def has_original_names(workspace: Workspace) -> Workspace:
    workspace.families = {name: replace(spec, original_name=str) for name, spec in workspace.families.items()}
    return workspace


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algo": "ia3"}, "algo ia3 "),
        ({"algo": "lora", "weight_decompose": True}, "it computes weight_decompose rightly with wd_on_out"),
        ({"algo": "lokr", "dora_wd": True, "wd_on_output": True}, "it computes weight_decompose rightly"),
        ({"apply_preset": {"name_algo_map": {"mid": {"algo": "boft"}}}}, "algo boft "),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"algo": "lora", "use_tucker": True}}}},
            "use_tucker has no export",
        ),
    ],
)
def test_an_adapter_that_no_export_holds_is_refused(
    workspace: Workspace, changes: dict[str, object], reason: str
) -> None:
    workspace.lycoris |= changes
    message = has_original_names(workspace).problems(lora_format="comfyui")
    assert f"lora_format  comfyui: {reason}" in message
    assert "lora_format to diffusers" in message


def test_a_lycoris_json_without_its_lora_type_is_no_plain_lora(workspace: Workspace) -> None:
    workspace.without("lora_type")
    assert "lora_type  lycoris_config has no effect" in workspace.problems()


def test_a_default_that_follows_from_a_wrong_value_is_no_second_problem(workspace: Workspace) -> None:
    message = workspace.problems(lora_type="tlora")
    assert message.startswith("config.json: 1 problem\n")


def test_a_plain_lora_of_what_is_rescaled_too_is_refused(workspace: Workspace) -> None:
    changes = {"lora_type": "standard", "lora_format": "comfyui", "use_dora": True}
    assert "comfyui: it computes use_dora otherwise" in has_original_names(workspace).problems(**changes)


@pytest.mark.parametrize("start", ["olora", "pissa"])
@pytest.mark.parametrize("other", [{"use_dora": True}, {"init_lora": "start.safetensors"}], ids=str)
def test_a_start_from_the_base_weights_is_the_only_one(
    workspace: Workspace, start: str, other: dict[str, object]
) -> None:
    workspace.text("start.safetensors", "")
    changes = {"lora_type": "standard", "lora_init_type": start} | other
    message = workspace.problems(**changes)
    assert f"lora_init_type  {start} " in message
    assert next(iter(other)) in message


def test_a_plain_lora_is_refused_by_a_family_without_original_names(workspace: Workspace) -> None:
    assert "lora_format  comfyui: toy has no such" in workspace.problems(lora_format="comfyui")


@pytest.mark.parametrize(
    "changes",
    [{"algo": "loha"}, {"algo": "lokr"}, {"algo": "dylora"},
     {"algo": "lora", "weight_decompose": True, "wd_on_out": False}],
    ids=str,
)  # fmt: skip
def test_tensors_that_comfyui_reads_under_other_names_are_exported(
    workspace: Workspace, changes: dict[str, object]
) -> None:
    workspace.lycoris = {"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4.0} | changes
    assert has_original_names(workspace).load(lora_format="comfyui").adapter.lora_format == "comfyui"


def test_flux1s_shift_contradicts_a_fixed_one(workspace: Workspace) -> None:
    changes = {"flux2_training_shift": "flux1"}
    assert "flux2_training_shift" in workspace.problems(**changes, flow_schedule_shift=3.0)


@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_a_plain_lora_is_left_by_what_has_one(workspace: Workspace, lora_type: str) -> None:
    config = has_original_names(workspace).load(lora_format="comfyui", lora_type=lora_type)
    assert config.adapter.lora_format == "comfyui"
    assert config.resolved()["lora_format"] == "comfyui"
