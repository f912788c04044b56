"""The T-LoRA layer: a fused rank-2R branch beside a frozen layer, masked by the current rank mask m.

    y = W x + multiplier * (alpha / R) * [ P diag(lambda m) Q x  -  P0 diag(lambda0 m) Q0 x ]

The trained parameters are the differences dQ, dP, dlambda from the frozen initial factors, zero at the start.
With Q = Q0 + dQ, P = P0 + dP, lambda = lambda0 + dlambda the bracket equals

    B diag(m, m) A x,   A = [ lambda Q ; lambda0 dQ + dlambda Q ],   B = [ dP, P0 ]

which is exactly zero at the start in every dtype, where the difference of two products is rounding noise.
Importing this module registers the layer with LyCORIS in place of its own.

Shapes: B batch, N tokens, R rank, r active rank, I in features, O out features, k kernel.
Source: T-LoRA, arXiv:2507.05964.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from lycoris import modules as lycoris_modules
from lycoris import wrapper as lycoris_wrapper
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from simpletuner.helpers.adapters.quantised import dequantize
from simpletuner.helpers.adapters.sharding import full_tensor, is_sharded
from simpletuner.helpers.adapters.tlora import initialisation, mask
from simpletuner.helpers.adapters.tlora.branch import Branch, add_branch, add_factors, product_dtype
from simpletuner.helpers.adapters.tlora.delta import (
    Triplet,
    difference_factors,
    product_norm,
    shrink,
    ungrouped,
)
from simpletuner.helpers.adapters.tlora.forming import form
from simpletuner.helpers.adapters.tlora.lokr_layer import TLokrLayer
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import KEYS, StoredLayer, difference
from simpletuner.helpers.configuration.schema.lycoris import SigType, TLoraInit
from simpletuner.helpers.errors import AdapterError, ConfigError


class TLoraLayer(MaskedLayer):
    """One adapted layer. Its parameters are float32 whatever the base layer's dtype.

    Raises:
        ConfigError: The rank is above the layer's size, or T-LoRA does not support the layer's class.
    """

    name = "tlora"
    support_module = {"linear", "conv1d", "conv2d", "conv3d"}  # noqa: RUF012  LyCORIS declares it so
    weight_list = [*KEYS]  # noqa: RUF012
    weight_list_det = ["tlora_schedule", "lambda_layer"]  # noqa: RUF012

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | None = None,
        *_dropouts: object,  # LyCORIS passes its dropouts by position; the configuration refuses them
        tlora_init: TLoraInit = "random",
        sig_type: SigType = "last",
        schedule: RankSchedule | None = None,
        tlora_min_rank: float | None = None,
        tlora_alpha: float | None = None,
        mask_group_id: int = mask.PUBLIC_GROUP,
        seed: int = 0,
        factors: initialisation.Factors | None = None,
        **_others: object,
    ) -> None:
        super().__init__(lora_name, org_module, multiplier)
        if self.module_type not in self.support_module:
            class_name = type(org_module).__name__
            raise ConfigError(f"{lora_name}: T-LoRA does not support {class_name}. Add it to exclude_name.")
        self.lora_dim = lora_dim
        spec = TLoraSpec(tlora_init, sig_type, schedule)
        self.spec = spec.with_own(lora_dim, min_rank=tlora_min_rank, alpha=tlora_alpha)
        self.is_vanilla = tlora_init == "vanilla"  # without base branch and singular values
        self.scale = (alpha or lora_dim) / lora_dim
        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim)))
        self.set_group(mask_group_id)
        self._create_factors(factors or self._initial_factors(seed))

    @property
    def is_fused(self) -> bool:
        """Whether forward and backward are those of `branch`."""
        return not self.is_vanilla and self.module_type == "linear"

    @property
    def num_groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        return int(self.kw_dict.get("groups", 1))

    def _initial_factors(self, seed: int) -> initialisation.Factors:
        shape = self.shape[0], int(torch.Size(self.shape[1:]).numel())
        if self.lora_dim > min(shape):
            raise ConfigError(
                f"{self.lora_name}: rank {self.lora_dim} is above the smaller side of this {shape[0]}x"
                f"{shape[1]} layer. Lower linear_dim to {min(shape)} or exclude the layer."
            )
        if self.lora_dim % self.num_groups:
            raise ConfigError(
                f"{self.lora_name}: rank {self.lora_dim} is not a multiple of this convolution's "
                f"{self.num_groups} groups. Change linear_dim or exclude the layer."
            )
        layer, rank, name = self.org_module[0], self.lora_dim, self.lora_name
        weight = dequantize(layer, shape, name=name) if self.spec.init == "weight" else layer.weight
        return initialisation.initial_factors(weight, shape, rank=rank, spec=self.spec, seed=seed, name=name)

    def _create_factors(self, factors: initialisation.Factors) -> None:
        q = factors.q.float().reshape(self.lora_dim, *self.shape[1:])
        p, values = factors.p.float().contiguous(), factors.values.float()
        if self.is_vanilla:
            self.down, self.up = nn.Parameter(q), nn.Parameter(p)
            return
        self.register_buffer("base_q", q)
        self.register_buffer("base_p", p)
        self.register_buffer("base_lambda", values)
        self.delta_q, self.delta_p = nn.Parameter(torch.zeros_like(q)), nn.Parameter(torch.zeros_like(p))
        self.delta_lambda = nn.Parameter(torch.zeros_like(values))

    def lora_factors(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """The two factors of the delta without its scale, over the first `rank` ranks, float32.

        Returns:
            A [2r, I] (or [2r, I, k...]) and B [O, 2r]; [r, ...] and [O, r] for a vanilla layer.
        """
        if self.is_vanilla:
            return self.down[:rank], self.up[:, :rank]
        return difference_factors(self.base, self.differences, rank=rank)

    @property
    def base(self) -> Triplet:
        """Q0 [R, I, ...], P0 [O, R] and lambda0 [R]; not there in a vanilla layer."""
        return self.base_q, self.base_p, self.base_lambda

    @property
    def differences(self) -> Triplet:
        """dQ, dP and dlambda, the trained parameters, of the same shapes."""
        return self.delta_q, self.delta_p, self.delta_lambda

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
        current = self._group.current(self.ranks)
        rank_mask, rank, gain = self._active_ranks(current, x)
        strength = self.scale * self.multiplier * gain
        if self.is_fused and not torch.compiler.is_compiling():
            rank = rank or self.lora_dim
            return self._fused(x, output, current=current, rank_mask=rank_mask, rank=rank, strength=strength)
        a, b = self.lora_factors(rank)
        if rank_mask is not None:
            if not self.is_vanilla:
                rank_mask = torch.cat([rank_mask, rank_mask], dim=1)
            if rank_mask.shape[0] == 1:
                a, rank_mask = a * rank_mask.view(-1, *(1,) * (a.ndim - 1)), None
        if self.module_type != "linear":
            return self._convolve(x, output, a=a, b=b * strength, rank_mask=rank_mask)
        return add_factors(x, output, a=a.to(x.dtype), b=b, rank_mask=rank_mask, strength=strength)

    def _fused(
        self,
        x: Tensor,
        output: Tensor,
        *,
        current: mask.RankMask | None,
        rank_mask: Tensor | None,
        rank: int,
        strength: float,
    ) -> Tensor:
        """A linear layer's output with factors formed for many layers, or with a backward pass of its own."""
        dtype = product_dtype(x)
        factors = self._factors_of_step(current, rank=rank, dtype=dtype)
        if current is None or factors is None:
            differences = self.differences
            formed = form(self.base, differences, rank=rank, dtype=dtype)
            branch = Branch(self.lora_dim, rank_mask, strength)
            return add_branch(branch, x, output=output, formed=formed, differences=differences)
        a, b = factors
        both = None if rank_mask is None else current.of_both_halves(x.device)
        return add_factors(x, output, a=a, b=b, rank_mask=both, strength=strength)

    def _factors_of_step(
        self, current: mask.RankMask | None, *, rank: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """A and B formed with those of other layers; None where this layer's are formed alone."""
        if current is None or current.formed is None or not torch.is_grad_enabled() or is_sharded(self):
            return None
        members = self._group.members.items()
        others = (
            layer
            for layer, ranks in members
            if isinstance(layer, TLoraLayer) and layer.is_fused and ranks == self.ranks
        )
        return current.formed.of(self, others, rank=rank, dtype=dtype)

    def _convolve(
        self, x: Tensor, output: Tensor, *, a: Tensor, b: Tensor, rank_mask: Tensor | None
    ) -> Tensor:
        # Each half by itself: in a grouped convolution, channel j reads input group j // (R / groups).
        halves = [
            self.op(x, half.to(x.dtype), None, **self.kw_dict) for half in torch.split(a, self.lora_dim)
        ]
        hidden = torch.cat(halves, dim=1)
        if rank_mask is not None:
            hidden = hidden * rank_mask.to(hidden.dtype).view(*rank_mask.shape, *(1,) * (hidden.ndim - 2))
        kernel = b.view(*b.shape, *(1,) * (hidden.ndim - 2))
        contribution: Tensor = self.op(hidden, kernel.to(hidden.dtype))
        return output + contribution.to(output.dtype)

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: torch.device | None = None
    ) -> tuple[Tensor, None]:
        """The dense delta under the current mask (all ranks without one), in the base weight's shape.

        Raises:
            AdapterError: The layer is a grouped convolution, whose delta mixes groups and has no such shape.
        """
        if self.num_groups > 1:
            raise AdapterError(f"{self.lora_name}: a grouped convolution has no delta of the weight's shape.")
        current = self._group.current(self.ranks)
        a, b = self.lora_factors()
        if current is not None:
            row = current.values[0]
            b = b * (row if self.is_vanilla else torch.cat([row, row])).to(b.device)
        delta = (b @ a.flatten(1)).view(self.shape) * (self.scale * multiplier)
        return delta.to(device or delta.device).view(shape or self.shape), None

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: torch.device | None = None) -> tuple[bool, Tensor]:
        """Shrink the differences until the full-rank delta's Frobenius norm is at most `max_norm`.

        Returns:
            Whether the parameters were scaled, and the norm afterwards.
        """
        trained = [self.up] if self.is_vanilla else [self.delta_q, self.delta_p, self.delta_lambda]
        return shrink(trained, norm=self.delta_norm, limit=max_norm)

    def delta_norm(self) -> Tensor:
        """Frobenius norm of the full-rank delta at multiplier 1, without forming it."""
        a, b = self.lora_factors()
        return product_norm(ungrouped(a, groups=self.num_groups, rank=self.lora_dim), b) * self.scale

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The layer's tensors under the keys of adapter files: sums of base and difference, and the base."""
        p_shape = (self.shape[0], self.lora_dim) + (1,) * (len(self.shape) - 2)
        state = {"alpha": self.alpha, "tlora_schedule": self.spec.tensor(self.lora_dim)}
        if self.is_vanilla:
            down, up = full_tensor(self.down), full_tensor(self.up)
            return state | {"lora_down.weight": down, "lora_up.weight": up.view(p_shape)}
        return state | {
            "q_layer.weight": self.base_q + full_tensor(self.delta_q),
            "p_layer.weight": (self.base_p + full_tensor(self.delta_p)).view(p_shape),
            "lambda_layer": (self.base_lambda + full_tensor(self.delta_lambda))[None],
            "base_q": self.base_q,
            "base_p": self.base_p.view(p_shape),
            "base_lambda": self.base_lambda[None],
        }

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        given = {key: state_dict[prefix + key] for key in KEYS if prefix + key in state_dict}
        missing_keys, error_messages = args[2], args[4]
        if not given:
            missing_keys.append(f"{prefix}{self.weight_list_det[0]}")
            return
        try:
            self._load(StoredLayer.read(self.lora_name, given))
        except AdapterError as error:
            error_messages.append(str(error))

    @torch.no_grad()
    def _load(self, stored: StoredLayer) -> None:
        stored.check_fits(self.custom_state_dict())
        if (stored.spec.init == "vanilla") != self.is_vanilla:
            found, own = stored.spec.init, self.spec.init
            raise AdapterError(f"{self.lora_name}: the file's init is {found}, the adapter's {own}.")
        if self.is_vanilla:
            self.down.copy_(stored.tensors["lora_down.weight"])
            self.up.copy_(stored.tensors["lora_up.weight"].view(self.up.shape))
            return
        base = stored.base
        spec = replace(self.spec, init=stored.spec.init, sig_type=stored.spec.sig_type)
        if base is None and spec != self.spec:  # a stock file: its base comes from the weight
            self.spec = spec
            base = self._initial_factors(seed=0)
        self.spec = spec
        if base is not None:
            self.base_q.copy_(base.q.view(self.base_q.shape))
            self.base_p.copy_(base.p)
            self.base_lambda.copy_(base.values)
        self.delta_q.copy_(difference(stored.tensors["q_layer.weight"], self.base_q))
        self.delta_p.copy_(difference(stored.tensors["p_layer.weight"], self.base_p))
        self.delta_lambda.copy_(difference(stored.tensors["lambda_layer"], self.base_lambda))

    @classmethod
    def make_module_from_state_dict(
        cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None
    ) -> Self:
        """Make a layer from a file's tensors.

        Raises:
            AdapterError: Factors are missing or do not fit the layer.
        """
        given = {key: tensor for key, tensor in zip(KEYS, weights, strict=True) if tensor is not None}
        stored = StoredLayer.read(lora_name, given)
        try:
            layer = cls(
                lora_name,
                orig_module,
                1.0,
                stored.rank,
                stored.alpha,
                tlora_init=stored.spec.init,
                sig_type=stored.spec.sig_type,
                schedule=stored.spec.schedule,
                tlora_min_rank=stored.spec.min_rank,
                tlora_alpha=stored.spec.alpha,
                factors=stored.base,
            )
        except RuntimeError as error:
            raise AdapterError(f"{lora_name}: the file's factors do not fit this layer: {error}") from error
        layer._load(stored)
        return layer


def register() -> None:
    """Put the layers with a rank schedule in the place of LyCORIS's T-LoRA layer.

    First in its list, they recognise marked files before the layers whose keys those have.
    """
    own = (TLokrLayer, TLoraLayer)
    others = [module for module in lycoris_modules.MODULE_LIST if module not in (*own, TLoraModule)]
    lycoris_modules.MODULE_LIST[:] = [*own, *others]
    lycoris_wrapper.network_module_dict.update({layer.name: layer for layer in own})


register()
