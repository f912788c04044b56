"""One T-LoRA layer of an adapter file, checked before its tensors are used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from simpletuner.helpers.adapters.tlora.delta import difference_factors
from simpletuner.helpers.adapters.tlora.initialisation import Factors
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.logs import log_once

logger = logging.getLogger(__name__)

TRAINED_KEYS = ("q_layer.weight", "p_layer.weight", "lambda_layer")
BASE_KEYS = ("base_q", "base_p", "base_lambda")
VANILLA_KEYS = ("lora_down.weight", "lora_up.weight")
KEYS = ("tlora_schedule", "alpha", *TRAINED_KEYS, *BASE_KEYS, *VANILLA_KEYS)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """The tensors of one layer under their keys, complete for its spec."""

    name: str
    tensors: Mapping[str, Tensor]
    spec: TLoraSpec

    @classmethod
    def read(cls, name: str, tensors: Mapping[str, Tensor]) -> Self:
        """Check that no tensor is missing. A layer without base factors is stock LyCORIS's: weight/principal.

        Raises:
            AdapterError: A tensor is missing, or the layer's spec is invalid.
        """
        if "alpha" in tensors and tensors["alpha"].numel() != 1:
            raise AdapterError(f"{name}: alpha holds {tensors['alpha'].numel()} values instead of one.")
        spec = TLoraSpec.read(tensors.get("tlora_schedule"))
        if "tlora_schedule" not in tensors and VANILLA_KEYS[0] in tensors:  # a standard LoRA
            spec = TLoraSpec("vanilla", "last", None)
        has_base = any(key in tensors for key in BASE_KEYS)
        if spec.init == "vanilla":
            needed: tuple[str, ...] = VANILLA_KEYS
        elif has_base:
            needed = TRAINED_KEYS + BASE_KEYS
        else:
            needed = TRAINED_KEYS
            spec = TLoraSpec("weight", "principal", spec.schedule)
            log_once(
                logger.warning,
                "This T-LoRA file has no base factors (stock LyCORIS and SimpleTuner write none). They were "
                "computed from this model's weights as weight/principal; the result is wrong if the training "
                "used another init or other base weights.",
            )
        missing = [key for key in needed if key not in tensors]
        if missing:
            raise AdapterError(f"{name}: the file is incomplete: {missing[0]} is missing.")
        return cls(name, tensors, spec)

    @property
    def rank(self) -> int:
        """R of the layer."""
        key = VANILLA_KEYS[0] if self.spec.init == "vanilla" else TRAINED_KEYS[0]
        return self.tensors[key].shape[0]

    @property
    def alpha(self) -> float | None:
        """The layer's alpha; None in a file without one."""
        return float(self.tensors["alpha"]) if "alpha" in self.tensors else None

    @property
    def base(self) -> Factors | None:
        """The base factors; None in a file without them."""
        if BASE_KEYS[0] not in self.tensors:
            return None
        q, p, values = (self.tensors[key] for key in BASE_KEYS)
        return Factors(q=q.flatten(1), p=p.flatten(1), values=values.flatten())

    @property
    def scale(self) -> float:
        """Quotient alpha / R; 1 in a file without alpha."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors_at(self, rank: int) -> tuple[Tensor, Tensor]:
        """The two factors of the delta without its scale, over the first `rank` ranks, float32.

        Returns:
            A [2r, I, ...] and B [O, 2r]; [r, I, ...] and [O, r] for a vanilla layer.
        """
        if self.spec.init == "vanilla":
            down, up = (self.tensors[key].float() for key in VANILLA_KEYS)
            return down[:rank], up.flatten(1)[:, :rank]
        q, p, values = (self.tensors[key].float() for key in BASE_KEYS)
        base = q, p.flatten(1), values.flatten()
        totals = (self.tensors[key] for key in TRAINED_KEYS)
        differences = [difference(total, start) for total, start in zip(totals, base, strict=True)]
        return difference_factors(base, (differences[0], differences[1], differences[2]), rank=rank)

    def check_fits(self, own: Mapping[str, Tensor]) -> None:
        """Compare with the tensors of the layer that will load this one.

        Raises:
            AdapterError: A shape or the alpha differs.
        """
        for key, tensor in self.tensors.items():
            if key in own and key not in ("alpha", "tlora_schedule") and own[key].shape != tensor.shape:
                found, wanted = tuple(tensor.shape), tuple(own[key].shape)
                raise AdapterError(
                    f"{self.name}: {key} has shape {found} in the file, {wanted} in the layer."
                )
        if self.alpha is not None and self.alpha != float(own["alpha"]):
            raise AdapterError(
                f"{self.name}: the file's alpha is {self.alpha:g}, the adapter's {float(own['alpha']):g}. "
                f"Set linear_alpha to {self.alpha:g}."
            )


def difference(total: Tensor, base: Tensor) -> Tensor:
    """`d` such that `base + d` equals `total` to the last bit wherever float32 allows it."""
    total = total.to(device=base.device, dtype=torch.float32).view(base.shape)
    first = total - base
    return first + (total - (base + first))
