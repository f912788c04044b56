"""Keys of noise, noise levels and loss that do not fit together, or to the family: one message each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from simpletuner.helpers.configuration.schema.noise import NoiseConfig, noise_problems
from simpletuner.helpers.models import registry
from simpletuner.helpers.models.key_groups import DIFFUSION_KEYS, FLOW_KEYS

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize(
    ("keys", "shown_at"),
    [
        ({"use_soft_min_snr": True}, {"use_soft_min_snr"}),
        ({"min_timestep": 500, "max_timestep": 500}, {"min_timestep"}),
        (
            {
                "timestep_bias_strategy": "range",
                "timestep_bias_begin": 400,
                "timestep_bias_end": 300,
                "timestep_bias_multiplier": 2,
            },
            {"timestep_bias_begin"},
        ),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_portion": 0, "timestep_bias_multiplier": 2},
            {"timestep_bias_portion"},
        ),
        ({"timestep_bias_strategy": "later"}, {"timestep_bias_multiplier"}),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2},
            {"timestep_bias_strategy"},
        ),
        (
            {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2, "max_timestep": 250},
            {"timestep_bias_strategy"},
        ),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            {"flow_use_beta_schedule"},
        ),
        (
            {
                "flow_use_beta_schedule": True,
                "flow_use_mode_schedule": True,
                "flow_cubic_schedule_weights": [1, 2],
                "flow_custom_timesteps": [0.5],
            },
            {"flow_use_mode_schedule", "flow_cubic_schedule_weights", "flow_custom_timesteps"},
        ),
        ({"flow_mode_schedule_scale": 1.8}, {"flow_mode_schedule_scale"}),
        ({"flow_mode_schedule_scale": -1.1}, {"flow_mode_schedule_scale"}),
        ({"flow_cubic_schedule_weights": [1]}, {"flow_cubic_schedule_weights"}),
        ({"flow_cubic_schedule_weights": [0, 0]}, {"flow_cubic_schedule_weights"}),
        ({"flow_cubic_schedule_weights": [1, -1]}, {"flow_cubic_schedule_weights"}),
        ({"flow_custom_timesteps": []}, {"flow_custom_timesteps"}),
        ({"flow_custom_timesteps": [0.5, -0.1]}, {"flow_custom_timesteps"}),
        ({"flow_custom_timesteps": [0.5, 1001]}, {"flow_custom_timesteps"}),
        ({"flow_custom_timesteps": [0.5], "min_timestep": 10}, {"flow_custom_timesteps"}),
        ({"flow_schedule_auto_shift": True, "flow_schedule_shift": 3}, {"flow_schedule_shift"}),
        ({"flux_guidance_min": 5}, {"flux_guidance_min"}),
        (
            {"min_timestep": 900, "max_timestep": 100, "use_soft_min_snr": True},
            {"min_timestep", "use_soft_min_snr"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_keys_that_contradict_each_other_are_all_named(keys: dict[str, Any], shown_at: set[str]) -> None:
    assert {problem[0][0] for problem in noise_problems(NoiseConfig(**keys))} == shown_at


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"use_soft_min_snr": True, "snr_gamma": 5},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 0.5},
        {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 2, "max_timestep": 251},
        {"flow_custom_timesteps": [0, 1000]},
        {"flow_mode_schedule_scale": 1.75},
    ],
    ids=str,
)
def test_keys_that_fit_together_are_no_problem(keys: dict[str, Any]) -> None:
    assert not list(noise_problems(NoiseConfig(**keys)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("huber_c", 0),
        ("huber_c", 1.5),
        ("huber_schedule", "cosine"),
        ("loss_type", "l1"),
        ("noise_offset_probability", 1.1),
        ("noise_offset", -0.1),
        ("multires_noise_discount", 0),
        ("input_perturbation", -1),
        ("timestep_bias_strategy", "middle"),
        ("timestep_bias_multiplier", 0),
        ("timestep_bias_portion", 2),
        ("min_timestep", -1),
        ("max_timestep", 1001),
        ("flow_custom_timesteps", "a"),
        ("flow_timesteps_mode", "random"),
    ],
)
def test_a_value_out_of_bounds_is_a_problem_of_its_key(workspace: Workspace, key: str, value: object) -> None:
    switches = {
        "loss_type": "huber",
        "offset_noise": True,
        "multires_noise_iterations": 6,
        "timestep_bias_strategy": "later",
        "flow_custom_timesteps": [0.5],
    }
    multiplier = {"timestep_bias_multiplier": 2}
    found = workspace.problems(**{**switches, **multiplier, key: value})
    assert key in found
    assert "1 problem" in found


def test_contradictions_are_listed_together_with_invalid_values(workspace: Workspace) -> None:
    found = workspace.problems(
        loss_type="huber",
        huber_c=5,
        use_soft_min_snr=True,
        min_timestep=900,
        max_timestep=100,
        flow_custom_timesteps="x",
    )
    assert "4 problems" in found
    assert all(key in found for key in ("huber_c", "use_soft_min_snr", "min_timestep", "flow_custom"))


@pytest.mark.parametrize("value", [[0.1, 0.5], "0.1,0.5", "[0.1, 0.5]", " 0.1 , 0.5 "], ids=str)
def test_a_list_of_numbers_is_read_from_a_text_too(value: object) -> None:
    assert NoiseConfig(flow_custom_timesteps=value).flow_custom_timesteps == (0.1, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "", "none"])
def test_no_list_of_numbers_is_none(value: object) -> None:
    assert NoiseConfig(flow_custom_timesteps=value).flow_custom_timesteps is None  # type: ignore[arg-type]
    assert NoiseConfig(flow_custom_timesteps=500).flow_custom_timesteps == (500.0,)  # type: ignore[arg-type]


VALUES = {
    "snr_gamma": 5.0,
    "use_soft_min_snr": True,
    "debiased_estimation_loss": True,
    "offset_noise": True,
    "multires_noise_iterations": 6,
    "timestep_bias_strategy": "later",
    "flow_sigmoid_mean": 1.0,
    "flow_use_mode_schedule": True,
    "flow_cubic_schedule_weights": [1, 2],
    "flow_custom_timesteps": [0.5],
}


def test_every_key_belongs_to_both_kinds_of_model_or_to_one() -> None:
    both = {"loss_type", "huber_c", "huber_schedule", "input_perturbation", "input_perturbation_steps"}
    both |= {"min_timestep", "max_timestep"}
    others = {key for key in NoiseConfig.model_fields if key.startswith(("flux_", "flux2_"))}
    assert NoiseConfig.model_fields.keys() - both - others == (DIFFUSION_KEYS | FLOW_KEYS) & {
        *NoiseConfig.model_fields
    }


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("flux", {key: VALUES[key] for key in VALUES if key in DIFFUSION_KEYS and key != "snr_gamma"}),
        ("flux2", {"offset_noise": True, "timestep_bias_strategy": "range"}),
        ("sdxl", {key: VALUES[key] for key in VALUES if key in FLOW_KEYS}),
    ],
    ids=["flux", "flux2", "sdxl"],
)
def test_keys_of_the_other_kind_of_model_are_refused_by_name(
    workspace: Workspace, family: str, keys: dict[str, object]
) -> None:
    workspace.families = registry.specs()
    workspace.config["model_family"] = family
    found = workspace.problems(**keys)
    assert [key for key in keys if key not in found] == []
    assert f"model_family {family}" in found
