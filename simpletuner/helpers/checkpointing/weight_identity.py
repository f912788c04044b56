"""Hashes of the weights that the trained ones stand beside: a resumed run must have the same."""

from __future__ import annotations

from collections.abc import Mapping

import xxhash
from torch import nn

from simpletuner.helpers.adapters.files.adapter_file import weight_hash
from simpletuner.helpers.adapters.quantised import is_quantized


def weight_hashes(denoiser: nn.Module) -> dict[str, str]:
    """Weight name -> hash, independent of its dtype. Quantised weights are left out."""
    weights = sorted(denoiser.named_parameters())
    return {name: weight_hash(weight) for name, weight in weights if not is_quantized(weight)}


def base_weights_hash(hashes: Mapping[str, str]) -> str:
    """Hash of a model from the hashes of its weights."""
    digest = xxhash.xxh3_64()
    for name, each in sorted(hashes.items()):
        digest.update(f"{name}={each}\n".encode())
    return digest.hexdigest()
