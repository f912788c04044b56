"""A json to start from for each algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.errors import ConfigError
from simpletuner.lycoris_defaults import default_lycoris_config

if TYPE_CHECKING:
    from conftest import Workspace


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_a_default_is_valid_for_its_algorithm(workspace: Workspace, algo: str) -> None:
    workspace.lycoris = default_lycoris_config(algo)
    config = workspace.load().lycoris
    assert config is not None
    assert config.algo == algo
    assert config.apply_preset.target_module == ("Attention", "FeedForward")


def test_the_caller_gets_a_copy() -> None:
    default_lycoris_config("tlora")["apply_preset"]["target_module"].append("X")  # type: ignore[index]
    assert default_lycoris_config("tlora")["apply_preset"] == {"target_module": ["Attention", "FeedForward"]}


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tlra' is not known\. Known algorithms: tlora, lora"):
        default_lycoris_config("tlra")
