"""An adapter's module as a child of the layer that it adapts.

So the adapter is reached from the trained model: it moves with it, is prepared, reduced and sharded with it.
Its keys stay out of the base model's `state_dict()`, and are not asked for when a base is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

CHILD_PREFIX = "lycoris_adapter"
IS_MOUNTED = re.compile(rf"(^|\.){CHILD_PREFIX}_\d+\.$")

_visible = False


@contextmanager
def adapter_keys_visible() -> Iterator[None]:
    """Let `state_dict()` of an adapted model list its adapters' tensors too, for sequential offload."""
    global _visible
    previous, _visible = _visible, True
    try:
        yield
    finally:
        _visible = previous


class UnlistedChild:
    """Mixin before a LyCORIS module: mounted in a layer, it adds nothing to the model's `state_dict()`.

    What it would list are sums made for a file, which are not made in vain here, and cannot be made while
    sequential offload keeps its parameters elsewhere.
    """

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """As LyCORIS's, but as it was given when called for a layer that it is mounted in."""
        if IS_MOUNTED.search(prefix):
            return options["destination"]
        return super().state_dict(*args, prefix=prefix, **options)  # type: ignore[misc]


class Attachment:
    """One adapter module mounted in one layer; `remove()` leaves the layer as it was."""

    def __init__(self, layer: nn.Module, adapter: nn.Module) -> None:
        taken = dict(layer.named_children())
        self.layer = layer
        self.name = next(name for i in range(len(taken) + 1) if (name := f"{CHILD_PREFIX}_{i}") not in taken)
        layer.add_module(self.name, adapter)
        self._handles: list[RemovableHandle] = [
            layer.register_state_dict_post_hook(_hide_keys),  # type: ignore[no-untyped-call]
            layer.register_load_state_dict_post_hook(_drop_missing_keys),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Take the adapter out of the layer."""
        for handle in self._handles:
            handle.remove()
        delattr(self.layer, self.name)


def adapters_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every adapter module mounted in a model."""
    for layer in model.modules():
        for name, child in layer.named_children():
            if name.startswith(CHILD_PREFIX):
                yield child


def _hide_keys(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}{CHILD_PREFIX}")]:
        del state_dict[key]
    if _visible:  # by their own names: LyCORIS modules list what their files hold instead
        for name, child in layer.named_children():
            if name.startswith(CHILD_PREFIX):
                tensors = chain(
                    child.named_parameters(f"{prefix}{name}"), child.named_buffers(f"{prefix}{name}")
                )
                state_dict.update((key, tensor.detach()) for key, tensor in tensors)


def _drop_missing_keys(layer: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if CHILD_PREFIX not in key]
