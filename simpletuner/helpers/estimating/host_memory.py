"""Main memory of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.helpers.estimating.device_memory import device_weights, text_encoder_bytes
from simpletuner.helpers.estimating.disk import GIB, caption_bytes
from simpletuner.helpers.estimating.run_facts import RunFacts

PROGRAM_BYTES = 3 * GIB
"""Of Python, torch, CUDA's libraries and the loader; not measured on a GPU."""


def host_memory(facts: RunFacts) -> Mapping[str, int]:
    """Name -> bytes of main memory, each at its peak, without empty parts."""
    run = facts.run
    loaded = facts.setup.layout.num_weights * facts.arithmetic.compute_bytes
    offloaded = facts.step_memory.weights - device_weights(facts)
    embeds = run.data.text_cache_memory * GIB
    if facts.num_images is not None:
        embeds = min(embeds, facts.num_images * caption_bytes(facts))
    parts = {
        "program": PROGRAM_BYTES,
        "model while it is loaded": max(loaded, text_encoder_bytes(facts)) - offloaded,
        "offloaded weights": offloaded,
        "EMA": facts.step_memory.ema if run.ema.ema_device == "cpu" else 0,
        "prompt embeds": 0 if run.trains_text else round(embeds),
    }
    return {name: number for name, number in parts.items() if number}
