"""Trackers: the values of `report_to`."""

from __future__ import annotations

from simpletuner.helpers.choices.registry import Choice, Registry

_TRACKERS = "simpletuner.helpers.reporting.trackers"

TRACKERS: Registry[Choice] = Registry(
    Choice(
        name="wandb",
        display_name="Weights & Biases",
        summary="Weights & Biases, online or offline by WANDB_MODE.",
        build=f"{_TRACKERS}:Wandb",
    ),
    Choice(
        name="tensorboard",
        display_name="TensorBoard",
        summary="TensorBoard event files in output_dir/tensorboard.",
        build=f"{_TRACKERS}:TensorBoard",
        package="tensorboard",
        extra="track",
    ),
    Choice(
        name="trackio",
        summary="Trackio, in its own folder on this machine; `trackio show` opens it.",
        build=f"{_TRACKERS}:Trackio",
        package="trackio",
        extra="track",
    ),
)
"""`build` names a Tracker class; its keywords are config, output_dir, settings and resumed_step."""
