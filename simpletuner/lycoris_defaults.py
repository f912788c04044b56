"""A lycoris json to start from, for each algorithm."""

from __future__ import annotations

from copy import deepcopy

from simpletuner.helpers.choices.algorithms import ALGORITHMS
from simpletuner.helpers.errors import ConfigError


def default_lycoris_config(algo: str) -> dict[str, object]:
    """A complete lycoris json for an algorithm, the caller's own copy.

    Raises:
        ConfigError: The algorithm is not known.
    """
    if algo not in ALGORITHMS:
        raise ConfigError(f"algo {algo!r} is not known. Known algorithms: {', '.join(ALGORITHMS)}.")
    return {
        "algo": algo,
        "multiplier": 1.0,
        **deepcopy(dict(ALGORITHMS[algo].defaults)),
        "apply_preset": {"target_module": ["Attention", "FeedForward"]},
    }


lycoris_defaults: dict[str, dict[str, object]] = {algo: default_lycoris_config(algo) for algo in ALGORITHMS}
"""Algorithm -> a lycoris json to start from, under the name that other programs import."""
