"""What layers with a rank schedule share: reading the mask, refusing to train without one, attachment.

Shapes: B batch, R rank.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Self, cast

import torch
from lycoris.modules.base import LycorisBaseModule
from torch import Tensor, nn

from simpletuner.helpers.adapters.attachment import Attachment, UnlistedChild
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.logs import log_once

logger = logging.getLogger(__name__)


class MaskedLayer(UnlistedChild, LycorisBaseModule):  # type: ignore[misc]  # LyCORIS has no type information
    """A layer whose `forward` adds the contribution of its active ranks to the base layer's output.

    It sets `spec` and calls `set_group` when it is made. Its parameters stay in their dtype when the model is
    cast.
    """

    spec: TLoraSpec
    _attachment: Attachment | None = None
    _group = mask.mask_group(mask.PUBLIC_GROUP)  # until `set_group`

    @property
    def schedule(self) -> RankSchedule | None:
        """The network's rank schedule; None when neither the caller nor the file gave one."""
        return self.spec.schedule

    @property
    def mask_group_id(self) -> int:
        """LyCORIS's number of the mask group."""
        return self._group.number

    def join(self, group: int, *, schedule: RankSchedule | None) -> None:
        """Follow a network's schedule, and read the masks of its group."""
        self.spec = replace(self.spec, schedule=schedule)
        self.set_group(group)

    def set_group(self, group: int) -> None:
        """Read the masks of this group from now on."""
        self._group.members.pop(self, None)
        self.ranks = self.spec.ranks(self.lora_dim)
        self._group = mask.join_group(group, layer=self.ranks)
        self._group.members[self] = self.ranks

    def _active_ranks(
        self, current: mask.RankMask | None, x: Tensor
    ) -> tuple[Tensor | None, int | None, float]:
        """The mask to multiply by, or the rank to slice to and its gain; both None activates every rank."""
        if current is None:
            self._refuse_to_train_unmasked()
            return None, None, 1.0
        schedule, values = self.spec.schedule, current.values
        if schedule is not None and current.max_rank not in (None, schedule.max_rank):
            raise AdapterError(
                f"The rank mask was made for max_rank {current.max_rank}, the network's is "
                f"{schedule.max_rank}. Pass the network's max_rank."
            )
        if not torch.compiler.is_compiling():
            if current.shared_rank is not None and self.module_type == "linear":  # cost falls with the rank
                return None, current.shared_rank, current.gain
            values = current.on(x.device)
        if values.shape[1] != self.lora_dim:  # only a mask that was set through LyCORIS
            raise AdapterError(
                f"{self.lora_name}: the rank mask is {values.shape[1]} ranks wide, the layer's rank is "
                f"{self.lora_dim}. Set a mask of the layer's rank."
            )
        if values.shape[0] not in (1, x.shape[0]):
            raise RuntimeError(
                f"{self.lora_name}: the rank mask is for {values.shape[0]} samples, the input has "
                f"{x.shape[0]}. Set one timestep per sample, or a single one for all."
            )
        return values, None, 1.0

    def _refuse_to_train_unmasked(self) -> None:
        if self.org_module[0].training:
            raise RuntimeError(
                f"{self.lora_name}: a T-LoRA layer in training mode needs a rank mask; without one every "
                "rank would train at every noise level. Call apply_tlora_timestep_mask before the forward "
                "and clear_tlora_mask after backward, or put the model in eval mode."
            )
        if torch.compiler.is_compiling():  # a log line cannot be part of a graph
            return
        log_once(
            logger.warning,
            "A model with T-LoRA layers ran without a rank mask, with every rank active at every timestep. "
            "Set `_tlora_config` on a bundled pipeline, or call apply_tlora_inference_mask at each step.",
        )

    def apply_to(self, **_: object) -> None:
        """Add the branch to the base layer's output from now on; a second call changes nothing."""
        if self._attachment is not None:
            return
        layer: nn.Module = self.org_module[0]
        self.to(device=cast(Tensor, layer.weight).device)
        self._attachment = Attachment(layer, self)
        self._hook = layer.register_forward_hook(self._after_base, with_kwargs=True)

    def restore(self) -> None:
        """Remove the branch; the base layer becomes bit-identical to its original."""
        if self._attachment is not None:
            self._hook.remove()
            self._attachment.remove()
            self._attachment = None

    def merge_to(self, multiplier: float = 1.0, *, precise: bool = False) -> None:
        """Attach the layer without merging: a delta that depends on the timestep is not one matrix.

        Args:
            multiplier: Strength, multiplied by the layer's own; a second call changes nothing.
            precise: Without effect, since nothing is rounded.
        """
        log_once(
            logger.info,
            "merge_to() attaches T-LoRA layers without merging them, because their delta depends on the "
            "timestep. Set `_tlora_config` on the pipeline to mask the ranks at each step.",
        )
        if self._attachment is None:
            self.multiplier *= multiplier
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
