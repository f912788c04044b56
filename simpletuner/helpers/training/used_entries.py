"""Which cache entries a configuration uses, for `simpletuner cache prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.sampling.prompts import expand_prompts
from simpletuner.helpers.training.caches import prompts_to_encode
from simpletuner.helpers.training.preparing import build_data, build_family

if TYPE_CHECKING:
    from pathlib import Path

    from simpletuner.helpers.configuration.schema.sections import RunConfig


def used_entries(config: RunConfig) -> dict[Path, set[str]]:
    """Folder of a store -> the keys of the entries that a run of this configuration reads. Loads no weights.

    Raises:
        SimpleTunerError: A file of the model is missing, or a dataset cannot be used.
    """
    family = build_family(config, device=torch.device("cpu"))
    data = build_data(config, family=family, watch=LoaderWatch())
    data.set_encoders(vae_identity=family.vae_identity, text_identity=family.text_identity)
    prompts = expand_prompts(config.validation, seed=config.training.seed)
    pairs = [(each.store, each.key) for each in (*data.latents_requests(), *data.mask_requests())]
    reads_texts = data.caches_text and not config.data.text_cache_disable
    texts = data.text_requests(prompts_to_encode(prompts, config.validation)) if reads_texts else []
    used: dict[Path, set[str]] = {}
    for store, key in (*pairs, *((each.store, each.key) for each in texts)):
        used.setdefault(store.folder.resolve(), set()).add(key)
    return used
