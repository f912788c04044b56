"""The T-LoKr layer: a Kronecker product beside a frozen layer, whose larger factor follows a rank schedule.

    y = W x + multiplier * (alpha / R) * kron(w1, w2_a diag(m) w2_b) x

The second part of the larger factor, w2_b, is zero at the start, so the delta is exactly zero at every t.
The product is applied factor by factor; no matrix of the size of W is built.

Shapes: B batch, R rank, r active rank, I = m n in features, O = l k out features; w1 [l, m], w2_a [k, R],
w2_b [R, n].
Source: LoKr, arXiv:2309.14859; the rank mask of T-LoRA, arXiv:2507.05964, on its decomposed factor is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.helpers.adapters.lycoris_layers import LokrLayer
from simpletuner.helpers.adapters.sharding import full_tensor
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.randomness import mix

SCHEDULE_PART = "tlora_schedule"


class TLokrLayer(MaskedLayer, LokrLayer):
    """One adapted layer. Its parameters are float32 whatever the base layer's dtype.

    Raises:
        ConfigError: The larger factor is not decomposed at this rank, or T-LoKr does not support the layer.
    """

    name = "tlokr"
    weight_list = [*LokrLayer.weight_list, SCHEDULE_PART]  # noqa: RUF012  LyCORIS declares it so

    def __init__(
        self,
        *args: Any,
        schedule: RankSchedule | None = None,
        tlora_min_rank: float | None = None,
        tlora_alpha: float | None = None,
        mask_group_id: int = mask.PUBLIC_GROUP,
        seed: int = 0,
        **options: Any,
    ) -> None:
        lora_name, org_module = args[:2]
        if not isinstance(org_module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            class_name = type(org_module).__name__
            raise ConfigError(f"{lora_name}: T-LoKr does not support {class_name}. Add it to exclude_name.")
        super().__init__(*args, **options)
        if self.kw_dict.get("groups", 1) != 1:
            raise ConfigError(
                f"{lora_name}: T-LoKr does not support a convolution with groups. Add it to exclude_name."
            )
        if self.use_w2 and not self.full_matrix:
            k, n = self.lokr_w2.shape[:2]
            raise ConfigError(
                f"{lora_name}: rank {self.lora_dim} is too high to split the larger factor, {k}x{n} here, "
                "and a whole factor has no ranks to mask. Lower linear_dim below "
                f"{math.ceil(max(k, n) / 2)}, lower factor, or exclude the layer."
            )
        self.spec = TLoraSpec("vanilla", "last", schedule).with_own(
            self.lora_dim, min_rank=tlora_min_rank, alpha=tlora_alpha
        )
        self.set_group(mask_group_id)
        if not self.full_matrix:  # LokrLayer makes a whole one first, and takes the factors of a file
            self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draw the factors from the seed and the layer's name, in LyCORIS's distribution."""
        for key, factor in self.named_parameters():
            if key != "lokr_w2_b" and not factor.is_meta:
                generator = torch.Generator().manual_seed(mix(seed, "tlokr", self.lora_name, key))
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)

    def first_factor(self) -> Tensor:
        """The smaller factor w1, [l, m]."""
        first: Tensor = self.lokr_w1 if self.use_w1 else self.lokr_w1_a @ self.lokr_w1_b
        return first

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the active ranks' contribution to the base layer's output.

        Args:
            x: [B, I], [B, N, I], or [B, I, H, W] for a convolution (one or three axes likewise).
            output: The base layer's output for `x`.

        Raises:
            RuntimeError: The base layer is in training mode without a mask, or the mask's batch size differs.
            AdapterError: The mask was made for another rank.
        """
        if self.multiplier == 0:
            return output
        rank_mask, rank, gain = self._active_ranks(self._group.current(self.ranks), x)
        a = self.lokr_w2_a[:, :rank] * (self.scale * self.multiplier * gain)
        b = self.lokr_w2_b[:rank]
        if rank_mask is not None and rank_mask.shape[0] == 1:
            b, rank_mask = b * rank_mask.view(-1, 1), None
        apply = self._multiply if self.module_type == "linear" else self._convolve
        contribution = apply(x, a=a.to(x.dtype), b=b.to(x.dtype), rank_mask=rank_mask)
        return output + contribution.to(output.dtype)

    def _multiply(self, x: Tensor, *, a: Tensor, b: Tensor, rank_mask: Tensor | None) -> Tensor:
        first = self.first_factor().to(x.dtype)
        hidden = F.linear(x.reshape(*x.shape[:-1], first.shape[1], -1), b)  # [B, ..., m, r]
        if rank_mask is not None:
            hidden = hidden * rank_mask.to(hidden.dtype).view(len(rank_mask), *(1,) * (hidden.ndim - 2), -1)
        product: Tensor = first.to(hidden.dtype) @ F.linear(hidden, a)  # [B, ..., l, k]
        return product.flatten(-2)

    def _convolve(self, x: Tensor, *, a: Tensor, b: Tensor, rank_mask: Tensor | None) -> Tensor:
        first = self.first_factor().to(x.dtype)
        parts = x.reshape(len(x) * first.shape[1], -1, *x.shape[2:])  # [B m, n, ...]
        hidden = self.op(parts, b.view(len(b), parts.shape[1], *self.shape[2:]), None, **self.kw_dict)
        if rank_mask is not None:
            rows = rank_mask.to(hidden.dtype).repeat_interleave(first.shape[1], dim=0)
            hidden = hidden * rows.view(*rows.shape, *(1,) * (hidden.ndim - 2))
        hidden = self.op(hidden, a.view(*a.shape, *(1,) * (hidden.ndim - 2)).to(hidden.dtype))
        hidden = hidden.view(len(x), first.shape[1], *hidden.shape[1:])  # [B, m, k, ...]
        product = torch.einsum("lm,bm...->bl...", first.to(hidden.dtype), hidden)
        return product.flatten(1, 2)

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: torch.device | None = None
    ) -> tuple[Tensor, None]:
        """The dense delta under the current mask (all ranks without one), in the base weight's shape."""
        current = self._group.current(self.ranks)
        a = (
            self.lokr_w2_a
            if current is None
            else self.lokr_w2_a * current.values[0].to(self.lokr_w2_a.device)
        )
        delta = torch.kron(self.first_factor(), a @ self.lokr_w2_b) * (self.scale * multiplier)
        # Of a convolution the kernel is the last part of the columns in both.
        return delta.to(device or delta.device).view(shape or self.shape), None

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: torch.device | None = None) -> tuple[bool, Tensor]:
        """Shrink the delta of all ranks until its Frobenius norm is at most `max_norm`.

        Returns:
            Whether a parameter was scaled, and the norm afterwards.
        """
        norm = self.first_factor().norm() * (self.lokr_w2_a @ self.lokr_w2_b).norm() * self.scale
        if norm <= max_norm:
            return False, norm
        self.lokr_w2_b.mul_(max_norm / norm)
        return True, norm.new_tensor(max_norm)

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The layer's tensors under the keys of adapter files: LoKr's, and the schedule."""
        factors = {key: full_tensor(factor) for key, factor in self.named_parameters()}
        return factors | {"alpha": self.alpha, SCHEDULE_PART: self.spec.tensor(self.lora_dim)}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        missing_keys, error_messages = args[2], args[4]
        own = self.custom_state_dict()
        given = {key: state_dict[prefix + key] for key in own if prefix + key in state_dict}
        missing_keys += [prefix + key for key in own if key not in given and key != SCHEDULE_PART]
        try:
            self._take(given, own)
        except AdapterError as error:
            error_messages.append(str(error))

    @torch.no_grad()
    def _take(self, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        for key, factor in given.items():
            if key != SCHEDULE_PART and factor.shape != own[key].shape:
                found, wanted = tuple(factor.shape), tuple(own[key].shape)
                raise AdapterError(
                    f"{self.lora_name}: {key} has shape {found} in the file, {wanted} in the layer."
                )
        parameters = dict(self.named_parameters())
        for key, factor in given.items():
            if key in parameters:
                parameters[key].copy_(factor)

    def _take_factors(self, factors: Mapping[str, Tensor], alpha: float) -> None:
        super()._take_factors({key: each for key, each in factors.items() if key != SCHEDULE_PART}, alpha)

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        """Whether a layer of a file is T-LoKr: LoKr's factors with a schedule."""
        return {f"{lora_name}.lokr_w2_b", f"{lora_name}.{SCHEDULE_PART}"} <= state_dict.keys()

    @classmethod
    def make_module_from_state_dict(
        cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None
    ) -> Self:
        """Make a layer from a file's tensors.

        Raises:
            AdapterError: They are no two factors, or do not fit the layer.
        """
        layer: Self = super().make_module_from_state_dict(lora_name, orig_module, *weights)
        layer._follow(TLoraSpec.read(weights[-1]))
        return layer

    def _follow(self, stored: TLoraSpec) -> None:
        """Take the schedule of a file, and the layer's own values."""
        self.spec = TLoraSpec("vanilla", "last", stored.schedule).with_own(
            self.lora_dim, min_rank=stored.min_rank, alpha=stored.alpha
        )
        self.set_group(mask.PUBLIC_GROUP)
