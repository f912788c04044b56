"""Rules between sections, and between them and the model family."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prediction_type": "flow_matching"}, "toy predicts v_prediction, epsilon."),
        ({"prediction_type": "epsilonn"}, "Did you mean epsilon?"),
        ({"model_flavour": "lrge"}, '"lrge": must be one of small, large. Did you mean large?'),
        (
            {"model_flavour": "lrge", "pretrained_model_name_or_path": "a/b"},
            '"lrge": must be one of small, large.',
        ),
        ({"aspect_bucket_alignment": 12}, "12: must be a multiple of 8. Use 32."),
        ({"resolution": 24}, "24 is 24 px, below aspect_bucket_alignment 32. Raise it."),
        ({"validation_resolution": "100x64"}, "100x64: width and height must be multiples of 8. Use 96x64."),
        ({"validation_resolution": "64x100"}, "64x100: width and height must be multiples of 8. Use 64x96."),
    ],
)
def test_what_the_family_does_not_have_is_refused(
    workspace: Workspace, changes: dict[str, object], text: str
) -> None:
    message = workspace.problems(**changes)
    assert message.startswith("config.json: 1 problem\n")
    assert text in message


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
    workspace.families = {
        name: replace(facts, original_name=str) for name, facts in workspace.families.items()
    }
    return workspace


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algo": "loha"}, "algo loha is no plain LoRA"),
        ({"algo": "lora", "weight_decompose": True}, "weight_decompose trains more"),
        ({"apply_preset": {"name_algo_map": {"mid": {"algo": "lokr"}}}}, "algo lokr is no plain LoRA"),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"algo": "lora", "use_tucker": True}}}},
            "use_tucker trains more",
        ),
    ],
)
def test_a_plain_lora_of_what_has_no_such_form_is_refused(
    workspace: Workspace, changes: dict[str, object], reason: str
) -> None:
    workspace.lycoris |= changes
    message = has_original_names(workspace).problems(lora_format="comfyui")
    assert f"lora_format  comfyui: {reason}" in message
    assert "set it to diffusers" in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"use_dora": True}, "use_dora trains more"), ({"lora_init_type": "pissa"}, "pissa changes the base")],
)
def test_a_plain_lora_of_a_changed_base_is_refused(
    workspace: Workspace, changes: dict[str, object], reason: str
) -> None:
    changes = {"lora_type": "standard", "lora_format": "comfyui"} | changes
    assert reason in has_original_names(workspace).problems(**changes)


def test_a_plain_lora_is_refused_by_a_family_without_original_names(workspace: Workspace) -> None:
    assert "comfyui: toy has no such names here" in workspace.problems(lora_format="comfyui")


@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_a_plain_lora_is_left_by_what_has_one(workspace: Workspace, lora_type: str) -> None:
    config = has_original_names(workspace).load(lora_format="comfyui", lora_type=lora_type)
    assert config.adapter.lora_format == "comfyui"
    assert config.resolved()["lora_format"] == "comfyui"
