"""A lycoris json to start from, for each algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from simpletuner.helpers.errors import ConfigError

_TARGETS: Mapping[str, object] = {"target_module": ["Attention", "FeedForward"]}


def _plain(algo: str, *, dim: int, alpha: float, **arguments: object) -> dict[str, object]:
    return {
        "algo": algo,
        "multiplier": 1.0,
        "linear_dim": dim,
        "linear_alpha": alpha,
        **arguments,
        "apply_preset": dict(_TARGETS),
    }


# Above every layer's size LoKr keeps its larger factor whole, so that factor alone decides its size.
_LOKR_WHOLE = 10_000

_DEFAULTS: Mapping[str, dict[str, object]] = {
    "tlora": _plain(
        "tlora",
        dim=64,
        alpha=64.0,
        tlora_min_rank=32,
        tlora_alpha=1.0,
        tlora_schedule="floor",
        tlora_init="random",
        sig_type="last",
    ),
    "lora": _plain("lora", dim=16, alpha=16.0),
    "locon": _plain("locon", dim=16, alpha=16.0, conv_dim=8, conv_alpha=8.0),
    "loha": _plain("loha", dim=8, alpha=8.0),
    "lokr": _plain("lokr", dim=_LOKR_WHOLE, alpha=1.0, factor=16),
    "full": _plain("full", dim=1, alpha=1.0),
    "diag-oft": _plain("diag-oft", dim=8, alpha=1.0, constraint=0.0, rescaled=False),
    "boft": _plain("boft", dim=10, alpha=1.0, constraint=0.0, rescaled=False),
    "ia3": _plain("ia3", dim=1, alpha=1.0, train_on_input=False),
    "glora": _plain("glora", dim=8, alpha=8.0),
    "dylora": _plain("dylora", dim=16, alpha=16.0, block_size=4),
}


def default_lycoris_config(algo: str) -> dict[str, object]:
    """A complete lycoris json for an algorithm, the caller's own copy.

    Raises:
        ConfigError: The algorithm is not known.
    """
    if algo not in _DEFAULTS:
        raise ConfigError(f"algo {algo!r} is not known. Known algorithms: {', '.join(_DEFAULTS)}.")
    return deepcopy(_DEFAULTS[algo])
