"""Routes of tread_config: what is read, and where a mistake is shown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models import registry

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Workspace

ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}


@pytest.mark.parametrize("write", [dict, json.dumps], ids=["object", "text"])
def test_routes_are_read_from_an_object_and_from_text(workspace: Workspace, write: object) -> None:
    assert callable(write)
    config = workspace.load(tread_config=write({"routes": [ROUTE]}))
    assert config.training.tread_config is not None
    (route,) = config.training.tread_config.routes
    assert (route.selection_ratio, route.start_layer_idx, route.end_layer_idx) == (0.5, 2, -2)


@pytest.mark.parametrize("value", [None, "none", ""])
def test_without_a_value_nothing_is_routed(workspace: Workspace, value: object) -> None:
    assert workspace.load(tread_config=value).training.tread_config is None


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("two", "tread_config "),
        ({"routes": []}, "tread_config.routes "),
        ({"route": [ROUTE], "routes": [ROUTE]}, "tread_config.route "),
        ({"routes": [ROUTE | {"end_layer": 3}]}, "tread_config.routes[0].end_layer "),
        ({"routes": [ROUTE | {"selection_ratio": 1}]}, "tread_config.routes[0].selection_ratio "),
        ({"routes": [ROUTE, ROUTE | {"selection_ratio": 0}]}, "tread_config.routes[1].selection_ratio "),
        ({"routes": [ROUTE | {"start_layer_idx": 1.5}]}, "tread_config.routes[0].start_layer_idx "),
        ({"routes": [ROUTE | {"start_layer_idx": -1}]}, "tread_config.routes[0].start_layer_idx "),
        (
            {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2}]},
            "tread_config.routes[0].end_layer_idx ",
        ),
    ],
)
def test_a_mistake_is_shown_once_where_it_is(workspace: Workspace, value: object, place: str) -> None:
    problems = workspace.problems(tread_config=value)
    assert place in problems
    assert ": 1 problem\n" in problems


def test_a_model_without_a_transformer_refuses_routes(repository: Path) -> None:
    override = f"--tread_config={json.dumps({'routes': [ROUTE]})}"
    with pytest.raises(ConfigError, match="tread_config"):
        load_config(repository / "config/config.json", families=registry.specs(), overrides=[override])
