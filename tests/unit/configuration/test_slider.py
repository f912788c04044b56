"""A slider: strengths of datasets, target layers, and validation images at both ends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.unit.configuration.conftest import SPEC

if TYPE_CHECKING:
    from tests.unit.configuration.conftest import Workspace

STANDARD = {"lora_type": "standard", "lycoris_config": None}


@pytest.fixture
def slider(workspace: Workspace) -> Workspace:
    """The workspace with datasets of both directions and a neutral one."""
    workspace.datasets = [
        {"id": name, "instance_data_dir": "images", **keys}
        for name, keys in {
            "more": {"slider_strength": 0.5},
            "less": {"slider_strength": "-0.25"},
            "plain": {"slider_strength": 0},
            "other": {},
        }.items()
    ]
    return workspace


def test_strengths_are_read_and_zero_is_neutral(slider: Workspace) -> None:
    assert [each.slider_strength for each in slider.load().datasets] == [0.5, -0.25, None, None]


@pytest.mark.parametrize("value", ["nan", "inf", "strong", True, [1]], ids=str)
def test_what_is_no_strength_is_refused_beside_the_key(workspace: Workspace, value: object) -> None:
    workspace.datasets = [{"id": "photos", "instance_data_dir": "images", "slider_strength": value}]
    assert "photos.slider_strength" in workspace.problems()


@pytest.mark.parametrize(
    ("lycoris", "found"),
    [
        ({"algo": "tlora"}, None),
        ({"algo": "lokr", "factor": 4}, None),
        ({"algo": "boft", "linear_dim": 8}, "boft: "),
        ({"algo": "lora", "dora_wd": True}, "weight_decompose: "),
        ({"algo": "diag-oft"}, None),
        ({"algo": "diag-oft", "rescaled": True}, "rescaled: "),
        ({"algo": "lora", "apply_preset": {"name_algo_map": {"a": {"weight_decompose": True}}}}, "weight_"),
        ({"algo": "tlora", "apply_preset": {"name_algo_map": {"a": {"algo": "boft", "dim": 8}}}}, "boft: "),
    ],
    ids=["tlora", "lokr", "boft", "dora", "oft", "rescaled oft", "dora of a layer", "boft of a layer"],
)
def test_an_adapter_whose_effect_is_not_proportional_to_its_strength_trains_no_slider(
    slider: Workspace, lycoris: dict[str, Any], found: str | None
) -> None:
    slider.lycoris |= lycoris
    if found is None:
        slider.load()
        return
    message = slider.problems()
    assert f"lycoris_config  {found}" in message
    assert "slider_strength" in message
    slider.datasets = [{"id": "photos", "instance_data_dir": "images"}]
    slider.load()


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("lora_init_type", "pissa")])
def test_a_standard_lora_of_that_kind_trains_no_slider(slider: Workspace, key: str, value: object) -> None:
    slider.load(**STANDARD)
    message = slider.problems(**{key: value})
    assert "config.json: 1 problem" in message
    assert f"  {key}  " in message
    assert "slider_strength" in message


def shots(workspace: Workspace, **keys: object) -> list[tuple[str, float | None]]:
    return [(each.name, each.strength) for each in workspace.load(**keys).validation.prompts]


def test_prompts_are_shown_at_both_ends_unless_they_have_a_strength(slider: Workspace) -> None:
    slider.datasets.append({"id": "most", "instance_data_dir": "images", "slider_strength": 2})
    slider.text("own.json", '{"a": "a dog", "b": {"prompt": "a cat", "adapter_strength": 0.75}}')
    keys = {"validation_prompt": "a house", "user_prompt_library": "own.json"}
    both = [("validation", -0.25), ("validation", 2.0), ("a", -0.25), ("a", 2.0), ("b", 0.75)]
    assert shots(slider, **keys) == both
    doubled = [(name, strength if name == "b" else 2 * (strength or 0)) for name, strength in both]
    assert shots(slider, validation_lycoris_strength=2) == doubled
    slider.datasets = slider.datasets[:1]
    assert shots(slider, validation_lycoris_strength=1) == [("validation", 0.5), ("a", 0.5), ("b", 0.75)]
    slider.datasets = [{"id": "photos", "instance_data_dir": "images"}]
    assert shots(slider) == [("validation", None), ("a", None), ("b", 0.75)]


@pytest.fixture
def targeted(workspace: Workspace) -> Workspace:
    """A standard LoRA of a family that has layers for sliders."""
    spec = replace(SPEC, slider_targets=("attn1.to_q", "conv_in"))
    workspace.families = {"toy": spec}
    workspace.config |= STANDARD
    return workspace


def test_layers_for_sliders_take_the_place_of_the_family_s(targeted: Workspace) -> None:
    assert targeted.load().adapter.peft_lora_target_modules == ("to_q", "to_v")
    assert targeted.load(slider_lora_target="true").adapter.peft_lora_target_modules == (
        "attn1.to_q",
        "conv_in",
    )
    resolved = targeted.load().resolved()
    targeted.config = resolved
    assert targeted.load().resolved() == resolved


def test_two_choices_of_layers_are_refused_and_one_without_layers(
    targeted: Workspace, workspace: Workspace
) -> None:
    for names in (["to_q"], ".*to_(q|k)"):
        message = targeted.problems(slider_lora_target=True, peft_lora_target_modules=names)
        assert "slider_lora_target  names other layers than peft_lora_target_modules" in message
    workspace.families = {"toy": SPEC}
    assert "slider_lora_target  toy has" in workspace.problems(peft_lora_target_modules=["to_q"])
    workspace.load(lora_type="lycoris", lycoris_config="lycoris.json")  # whose json names its layers


def test_flux_names_its_layers_once(workspace: Workspace) -> None:
    workspace.families = {
        "toy": replace(
            SPEC,
            slider_targets=("to_q",),
            lora_presets={"all": ("to_q", "to_v")},
            lora_preset_key="flux_lora_target",
            own_keys=frozenset({"flux_lora_target"}),
        )
    }
    keys = {**STANDARD, "slider_lora_target": True, "flux_lora_target": "all"}
    assert "slider_lora_target  names other layers than flux_lora_target" in workspace.problems(**keys)
