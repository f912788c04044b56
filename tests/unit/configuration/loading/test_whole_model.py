"""Keys of model_type full, and those that do not go with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.translation_lines import default_lines

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.fixture
def full(workspace: Workspace) -> Workspace:
    """A run that trains the whole denoiser."""
    workspace.without("lora_type", "lycoris_config").config["model_type"] = "full"
    return workspace


def test_a_run_needs_no_key_of_an_adapter(full: Workspace) -> None:
    run = full.load()
    assert run.model.is_full
    assert run.lycoris is None
    assert run.algorithm.name == "whole_model"
    assert not run.whole_model.layer_filter
    assert default_lines(run.differing_defaults) is not None


def test_configuration_is_written_and_read_again(full: Workspace) -> None:
    run = full.load(layer_filter="^mid_block, up_blocks", fused_backward_pass=True, max_grad_norm=0)
    assert run.whole_model.layer_filter == ("^mid_block", "up_blocks")
    full.text("again.json", json.dumps(run.resolved()))
    again = load_config(full.folder / "again.json", families=full.families)
    assert again.resolved() == run.resolved()


@pytest.mark.parametrize(
    ("changes", "rate"), [({}, 1e-5), ({"optimizer": "lion"}, 2e-6), ({"optimizer": "prodigy"}, 1.0)]
)
def test_default_learning_rate_is_lower_than_that_of_an_adapter(
    full: Workspace, changes: dict[str, object], rate: float
) -> None:
    assert full.load(**changes).optimizer.learning_rate == pytest.approx(rate)
    assert full.load(learning_rate=3e-4).optimizer.learning_rate == 3e-4


def test_everything_that_needs_an_adapter_or_the_base_model_is_refused_at_once(full: Workspace) -> None:
    full.image_folder("images/regularisation")
    full.text("lycoris.json", "{}")
    full.text("prompts.json", json.dumps({"a": {"prompt": "a dog", "adapter_strength": 0.5}}))
    full.text("start.safetensors", "")
    entry = full.datasets[0]
    assert isinstance(entry, dict)
    full.datasets = [
        entry | {"slider_strength": 1.0},
        entry | {"id": "other", "slider_strength": -1.0},
        entry | {"id": "prior", "is_regularisation_data": True},
    ]
    wrong: dict[str, object] = {
        "lora_rank": 4,
        "lora_alpha": 3,
        "lora_type": "lycoris",
        "lycoris_config": "lycoris.json",
        "lora_format": "comfyui",
        "init_lora": "start.safetensors",
        "mixed_precision": "fp16",
        "base_model_precision": "int8-torchao",
        "enable_group_offload": True,
        "push_to_hub": True,
        "validation_lycoris_strength": 0.5,
        "user_prompt_library": "prompts.json",
    }
    message = full.problems(**wrong)
    named = {line.split()[0] for line in message.splitlines()[1:]}
    assert named >= {*wrong, "regularisation_target", "data_backend_config"}


@pytest.mark.parametrize("value", ["standard", None])
def test_a_key_of_adapters_at_its_default_is_taken(full: Workspace, value: str | None) -> None:
    key = "lycoris_config" if value is None else "lora_type"
    assert full.load(**{key: value, "lora_rank": 16}).model.is_full


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
        {"max_grad_norm": 1.0},
        *(
            {"optimizer": name, "max_grad_norm": 0}
            for name, each in OPTIMIZERS.items()
            if each.needs_all_gradients
        ),
    ],
    ids=str,
)
def test_fused_backward_pass_is_refused_where_gradients_must_be_kept(
    full: Workspace, changes: dict[str, object]
) -> None:
    message = full.problems(fused_backward_pass=True, **changes)
    assert message.startswith("config.json: 1 problem\n  fused_backward_pass ")
    assert full.load(fused_backward_pass=False, **changes).model.is_full


def test_value_clipping_goes_with_the_fused_backward_pass(full: Workspace) -> None:
    run = full.load(fused_backward_pass=True, grad_clip_method="value", max_grad_norm=0.5)
    assert run.whole_model.fused_backward_pass


@pytest.mark.parametrize(("key", "value"), [("layer_filter", "mid_block"), ("fused_backward_pass", True)])
def test_keys_of_whole_models_are_refused_beside_an_adapter(
    workspace: Workspace, key: str, value: object
) -> None:
    assert workspace.problems(**{key: value}).startswith(f"config.json: 1 problem\n  {key} ")


def test_an_invalid_expression_is_named(full: Workspace) -> None:
    assert "layer_filter" in full.problems(layer_filter=["mid_block", "up[0"])
