"""The T-LoRA layer: a fused rank-2R branch beside a frozen layer, its ranks opened by the current mask.

    y = W x + multiplier * (alpha / R) * [ P diag(lam m) Q x  -  P0 diag(lam0 m) Q0 x ]

What is trained are the differences dQ, dP, dlam from the frozen initial factors, zero at the start. With
Q = Q0 + dQ, P = P0 + dP, lam = lam0 + dlam the bracket equals

    B diag(m, m) A x,   A = [ lam Q ; lam0 dQ + dlam Q ],   B = [ dP, P0 ]

which is exactly zero at the start in every dtype, where the difference of two products is rounding noise.
Importing this module registers the layer with LyCORIS in place of its own.

Shapes: B batch, N tokens, R rank, r open rank, I in features, O out features, k kernel.
Source: T-LoRA, arXiv:2507.05964.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from lycoris import modules as lycoris_modules
from lycoris import wrapper as lycoris_wrapper
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from simpletuner.helpers.adapters.attachment import Attachment, UnlistedChild
from simpletuner.helpers.adapters.quantised import dequantize
from simpletuner.helpers.adapters.sharding import full_tensor
from simpletuner.helpers.adapters.tlora import initialisation, mask
from simpletuner.helpers.adapters.tlora.delta import difference_factors, product_norm, shrink, ungrouped
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import SigType, TLoraInit, TLoraSpec
from simpletuner.helpers.adapters.tlora.stored_layer import KEYS, StoredLayer, difference
from simpletuner.helpers.errors import AdapterError, ConfigError
from simpletuner.helpers.io.logs import log_once

logger = logging.getLogger(__name__)


class TLoraLayer(UnlistedChild, LycorisBaseModule):  # type: ignore[misc]  # LyCORIS has no type information
    """One adapted layer. Its parameters are float32 whatever the base layer's dtype.

    Raises:
        ConfigError: The rank is above the layer's size, or the layer is of a kind that has no T-LoRA.
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
        mask_group_id: int = mask.PUBLIC_GROUP,
        seed: int = 0,
        factors: initialisation.Factors | None = None,
        **_others: object,
    ) -> None:
        super().__init__(lora_name, org_module, multiplier)
        if self.module_type not in self.support_module:
            kind = type(org_module).__name__
            raise ConfigError(f"{lora_name}: a {kind} has no T-LoRA form. Exclude it by name.")
        self.lora_dim = lora_dim
        self.spec = TLoraSpec(tlora_init, sig_type, schedule)
        self.scale = (alpha or lora_dim) / lora_dim
        self.register_buffer("alpha", torch.tensor(float(alpha or lora_dim)))
        self.set_group(mask_group_id)
        self._attachment: Attachment | None = None
        self._create_factors(factors or self._initial_factors(seed))

    # What the layer is made of

    @property
    def is_vanilla(self) -> bool:
        """Whether the layer has no base branch and no singular values."""
        return self.spec.init == "vanilla"

    @property
    def num_groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        return int(self.kw_dict.get("groups", 1))

    @property
    def schedule(self) -> RankSchedule | None:
        """The network's rank schedule, where anything states one."""
        return self.spec.schedule

    def join(self, group: int, *, schedule: RankSchedule | None) -> None:
        """Become part of a network: its schedule, and its mask group from now on."""
        self.spec = replace(self.spec, schedule=schedule)
        self.set_group(group)

    def set_group(self, group: int) -> None:
        """Read the masks of this group from now on."""
        self.mask_group_id = group
        mask.register_rank(group, self.lora_dim)

    def _initial_factors(self, seed: int) -> initialisation.Factors:
        shape = self.shape[0], int(torch.Size(self.shape[1:]).numel())
        if self.lora_dim > min(shape):
            raise ConfigError(
                f"{self.lora_name}: rank {self.lora_dim} is above {min(shape)}, the smaller side of this "
                f"{shape[0]}x{shape[1]} layer. Lower linear_dim or exclude the layer."
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
        base = self.base_q, self.base_p, self.base_lambda
        return difference_factors(base, (self.delta_q, self.delta_p, self.delta_lambda), rank=rank)

    # What it computes

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the open ranks' contribution to what the base layer made of `x`.

        Args:
            x: [B, I], [B, N, I], or [B, I, H, W] for a convolution (one or three axes likewise).
            output: The base layer's result for `x`.

        Raises:
            RuntimeError: The base layer is in training mode with no mask set, or the mask's batch is another.
        """
        if self.multiplier == 0:
            return output
        gate, rank = self._gate(x)
        a, b = self.lora_factors(rank)
        b = b * (self.scale * self.multiplier)
        if gate is not None:
            gate = gate if self.is_vanilla else torch.cat([gate, gate], dim=1)
            if gate.shape[0] == 1:
                a, gate = a * gate.view(-1, *(1,) * (a.ndim - 1)), None
        if self.module_type != "linear":
            return self._convolve(x, output, a=a, b=b, gate=gate)
        hidden = F.linear(x, a.to(x.dtype))
        if gate is not None:
            # [B, 1, 2R]: without the token axis torch would mask tokens whenever N == B.
            hidden = hidden * gate.to(hidden.dtype).view(gate.shape[0], *(1,) * (hidden.ndim - 2), -1)
        b = b.to(hidden.dtype)
        if hidden.dtype != output.dtype:
            return output + F.linear(hidden, b).to(output.dtype)
        total = torch.addmm(output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), b.T)
        return total.view(output.shape)

    def _convolve(self, x: Tensor, output: Tensor, *, a: Tensor, b: Tensor, gate: Tensor | None) -> Tensor:
        # Each half by itself: in a grouped convolution, channel j reads input group j // (R / groups).
        halves = [
            self.op(x, half.to(x.dtype), None, **self.kw_dict) for half in torch.split(a, self.lora_dim)
        ]
        hidden = torch.cat(halves, dim=1)
        if gate is not None:
            hidden = hidden * gate.to(hidden.dtype).view(*gate.shape, *(1,) * (hidden.ndim - 2))
        kernel = b.view(*b.shape, *(1,) * (hidden.ndim - 2))
        contribution: Tensor = self.op(hidden, kernel.to(hidden.dtype))
        return output + contribution.to(output.dtype)

    def _gate(self, x: Tensor) -> tuple[Tensor | None, int | None]:
        """The mask to multiply by, or the rank to slice to; both None leaves every rank open."""
        gate = mask.current_mask(self.mask_group_id, self.lora_dim)
        if gate is None:
            self._refuse_to_train_unmasked()
            return None, None
        nominal = self.schedule.max_rank if self.schedule is not None else None
        mask.check_fits(gate, group=self.mask_group_id, rank=self.lora_dim, nominal=nominal)
        if not torch.compiler.is_compiling():
            if gate.device != x.device:
                gate = mask.move_mask(self.mask_group_id, self.lora_dim, x.device)
            rank = mask.shared_rank(self.mask_group_id, self.lora_dim)
            if rank is not None and self.module_type == "linear":  # cost falls with the rank
                return None, rank
        if gate.shape[0] not in (1, x.shape[0]):
            raise RuntimeError(
                f"{self.lora_name}: the rank mask is for {gate.shape[0]} samples, the input holds "
                f"{x.shape[0]}. Set one timestep per sample, or a single one for all."
            )
        return gate, None

    def _refuse_to_train_unmasked(self) -> None:
        if self.org_module[0].training:
            raise RuntimeError(
                f"{self.lora_name}: a T-LoRA layer ran in training mode with no rank mask, which would train "
                "every rank at every noise level. Call apply_tlora_timestep_mask before the forward and "
                "clear_tlora_mask after backward, or put the model in eval mode."
            )
        if torch.compiler.is_compiling():  # a log line cannot be part of a graph
            return
        log_once(
            logger.warning,
            "A model with T-LoRA layers ran with no rank mask: all ranks are open at every noise level. Set "
            "`_tlora_config` on a bundled pipeline, or call apply_tlora_inference_mask at each step.",
        )

    # Life in the model

    def apply_to(self, **_: object) -> None:
        """Add the branch to the base layer's output from now on; a second call changes nothing."""
        if self._attachment is not None:
            return
        layer: nn.Module = self.org_module[0]
        self.to(device=cast(Tensor, layer.weight).device)
        self._attachment = Attachment(layer, self)
        self._hook = layer.register_forward_hook(self._after_base, with_kwargs=True)

    def restore(self) -> None:
        """Take the branch off; the base layer is bit-identical to what it was."""
        if self._attachment is not None:
            self._hook.remove()
            self._attachment.remove()
            self._attachment = None

    def merge_to(self, multiplier: float = 1.0, *, precise: bool = False) -> None:
        """Attach the layer and keep it live: a delta that depends on the timestep is not one matrix."""
        log_once(
            logger.info,
            "merge_to() keeps T-LoRA layers live, because their delta depends on the timestep. "
            "Set `_tlora_config` on the pipeline, and the ranks follow it at each step.",
        )
        self.multiplier = multiplier
        self.apply_to()

    def _after_base(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return cast(Tensor, self(args[0] if args else kwargs["input"], output))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return cast(Self, super()._apply(keep_dtype, recurse))

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: torch.device | None = None
    ) -> tuple[Tensor, None]:
        """The dense delta under the current mask (all ranks without one), in the base weight's shape.

        Raises:
            AdapterError: The layer is a grouped convolution, whose delta mixes groups and has no such shape.
        """
        if self.num_groups > 1:
            raise AdapterError(f"{self.lora_name}: the delta of a grouped convolution is not of its shape.")
        gate = mask.current_mask(self.mask_group_id, self.lora_dim)
        a, b = self.lora_factors()
        if gate is not None:
            b = b * (gate[0] if self.is_vanilla else torch.cat([gate[0], gate[0]])).to(b.device)
        delta = (b @ a.flatten(1)).view(self.shape) * (self.scale * multiplier)
        return delta.to(device or delta.device).view(shape or self.shape), None

    @torch.no_grad()
    def apply_max_norm(self, max_norm: float, device: torch.device | None = None) -> tuple[bool, Tensor]:
        """Shrink the differences until the full-rank delta's Frobenius norm is at most `max_norm`.

        Returns:
            Whether anything was shrunk, and the norm afterwards.
        """
        trained = [self.up] if self.is_vanilla else [self.delta_q, self.delta_p, self.delta_lambda]
        return shrink(trained, norm=self.delta_norm, limit=max_norm)

    def delta_norm(self) -> Tensor:
        """Frobenius norm of the full-rank delta at multiplier 1, without forming it."""
        a, b = self.lora_factors()
        return product_norm(ungrouped(a, groups=self.num_groups, rank=self.lora_dim), b) * self.scale

    # What it stores

    def custom_state_dict(self) -> dict[str, Tensor]:
        """The layer under the keys of adapter files: sums of base and difference, and the base."""
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
            self._take_over(StoredLayer.read(self.lora_name, given))
        except AdapterError as error:
            error_messages.append(str(error))

    @torch.no_grad()
    def _take_over(self, stored: StoredLayer) -> None:
        stored.check_fits(self.custom_state_dict())
        if (stored.spec.init == "vanilla") != self.is_vanilla:
            found, own = stored.spec.init, self.spec.init
            raise AdapterError(f"{self.lora_name}: the file's init is {found}, the adapter's {own}.")
        if self.is_vanilla:
            self.down.copy_(stored.tensors["lora_down.weight"])
            self.up.copy_(stored.tensors["lora_up.weight"].view(self.up.shape))
            return
        base = stored.base
        began = replace(stored.spec, schedule=self.schedule)
        if base is None and began != self.spec:  # a stock file: its base is the weight's own
            self.spec = began
            base = self._initial_factors(seed=0)
        self.spec = began
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
        """The layer that a file describes, on the module that it names.

        Raises:
            AdapterError: Factors are missing or do not fit the layer.
        """
        given = {key: tensor for key, tensor in zip(KEYS, weights, strict=True) if tensor is not None}
        stored = StoredLayer.read(lora_name, given)
        began = stored.spec
        try:
            layer = cls(
                lora_name,
                orig_module,
                1.0,
                stored.rank,
                stored.alpha,
                tlora_init=began.init,
                sig_type=began.sig_type,
                schedule=began.schedule,
                factors=stored.base,
            )
        except RuntimeError as error:
            raise AdapterError(f"{lora_name}: the file's factors do not fit this layer: {error}") from error
        layer._take_over(stored)
        return layer


def register() -> None:
    """Put this layer in place of LyCORIS's own, first in line so that marked vanilla files are recognised."""
    others = [module for module in lycoris_modules.MODULE_LIST if module not in (TLoraLayer, TLoraModule)]
    lycoris_modules.MODULE_LIST[:] = [TLoraLayer, *others]
    lycoris_wrapper.network_module_dict["tlora"] = TLoraLayer


register()
