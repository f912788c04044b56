"""Mount an adapter's module as a child of the layer that it adapts.

So the denoiser contains the adapter: both move, are prepared, reduced and sharded together. The adapter's
keys stay out of the base model's `state_dict()`, and `load_state_dict()` does not require them.
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
    """Include the adapters' tensors in `state_dict()` of an adapted model, for sequential offload."""
    global _visible
    previous, _visible = _visible, True
    try:
        yield
    finally:
        _visible = previous


class UnlistedChild:
    """Mixin before a LyCORIS module: mounted in a layer, it adds nothing to the model's `state_dict()`.

    LyCORIS would build the merged tensors of a file: wasted here, and impossible under sequential offload.
    """

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """Return the given dict unchanged when mounted in a layer, else LyCORIS's."""
        if IS_MOUNTED.search(prefix):
            return options["destination"]
        return super().state_dict(*args, prefix=prefix, **options)  # type: ignore[misc]


class Attachment:
    """One adapter module mounted in one layer; `remove()` restores the layer."""

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
        """Remove the adapter from the layer."""
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
    if _visible:  # under the names of the parameters; a LyCORIS module's state_dict has those of its file
        for name, child in layer.named_children():
            if name.startswith(CHILD_PREFIX):
                tensors = chain(
                    child.named_parameters(f"{prefix}{name}"), child.named_buffers(f"{prefix}{name}")
                )
                state_dict.update((key, tensor.detach()) for key, tensor in tensors)


def _drop_missing_keys(layer: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if CHILD_PREFIX not in key]
