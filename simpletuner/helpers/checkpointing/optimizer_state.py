"""An optimiser's state as named tensors and JSON: its parameter groups and what it keeps for each parameter.

In the JSON a tensor stands as the name of its tensor, and a value that JSON lacks as an object with one tag.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.serialization import get_safe_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.helpers.adapters.sharding import distribute_like, gathered, is_dtensor
from simpletuner.helpers.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# Entries of a parameter group that the run sets; arguments of the optimiser's class are configuration too.
_OF_THE_RUN = {"params", "lr", "initial_lr"}


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into named tensors and JSON; `load_optimizer_state` joins them.

    Sharded tensors are `gathered`; then every process must call this.

    Raises:
        CheckpointError: The optimiser keeps a value that cannot be saved.
    """
    parameters = _parameters(optimizer)
    encoder = _Encoder()
    state = {}
    for index, parameter in enumerate(parameters):
        values = optimizer.state.get(parameter, {})
        encoder.device = parameter.device
        state[str(index)] = {
            name: encoder.encode(value, name=f"{index}.{name}") for name, value in values.items()
        }
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        encoder.device = group["params"][0].device if group["params"] else torch.device("cpu")
        groups.append(
            {
                name: encoder.encode(value, name=f"group{index}.{name}")
                for name, value in group.items()
                if name != "params"
            }
        )
    tensors = gathered(encoder.tensors)
    numbers = {
        "state": {index: values for index, values in state.items() if values},
        "groups": groups,
        "tensors": sorted(encoder.tensors),
        "shapes": [list(parameter.shape) for parameter in parameters],
    }
    return tensors, numbers


def load_optimizer_state(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], *, numbers: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state` returned into an optimiser; its configuration stays.

    Every tensor keeps its dtype, which `Optimizer.load_state_dict` casts to the parameter's.

    Raises:
        CheckpointError: A tensor is missing, belongs to no parameter, has another shape, or is not finite.
    """
    parameters = _parameters(optimizer)
    _check(tensors, numbers, parameters=parameters)
    decoder = _Decoder(optimizer, tensors)
    for index, values in _state_of(tensors, numbers).items():
        decoder.parameter = parameters[int(index)]
        optimizer.state[decoder.parameter] = {name: decoder.decode(value) for name, value in values.items()}
    configured = _OF_THE_RUN | inspect.signature(type(optimizer)).parameters.keys()
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        decoder.parameter = group["params"][0] if group["params"] else None
        group.update({name: decoder.decode(value) for name, value in saved.items() if name not in configured})


def num_state_bytes(optimizer: Optimizer) -> int:
    """Size of the tensors that an optimiser keeps for its parameters; of a sharded one, all its shards."""
    tensors = {id(tensor): tensor for tensor in _tensors_in(list(optimizer.state.values()))}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Plain tensors of a value, those of packed ones included."""
    if isinstance(value, Tensor):
        yield from _parts(value).values() if _is_packed(value) else (value,)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors_in(each)


def _is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is a wrapper of several others, such as codes and scales."""
    return is_traceable_wrapper_subclass(tensor) and not is_dtensor(tensor)


def _parts(packed: Any) -> dict[str, Tensor]:
    names, _ = packed.__tensor_flatten__()
    return {name: getattr(packed, name) for name in names}


def _is_paged(tensor: Any) -> bool:
    """Whether bitsandbytes pages this memory between the host and the device."""
    try:
        return bool(tensor.is_paged)
    except AttributeError:
        return False


def _packed_classes() -> dict[str, Any]:
    """Name -> class that its package registered with torch as safe to rebuild from a file."""
    classes = [each for each in get_safe_globals() if isinstance(each, type)]
    return {f"{each.__module__}.{each.__qualname__}": each for each in classes}


@dataclass(kw_only=True)
class _Encoder:
    """Turns values into JSON and collects their tensors. One that stands twice is collected once."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Of the parameter to which the values belong."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    """Identity of a tensor -> its name."""

    def encode(self, value: object, *, name: str) -> Any:
        if isinstance(value, Tensor):
            return self._packed(value, name) if _is_packed(value) else self._tensor(value, name)
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.encode(each, name=f"{name}.{index}") for index, each in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.encode(each, name=f"{name}.{key}") for key, each in value.items()}}
        raise CheckpointError(
            f"The optimiser's {name} is a {type(value).__qualname__}, which a checkpoint cannot hold, so the "
            "run could not be resumed. Choose another optimizer."
        )

    def _tensor(self, tensor: Tensor, name: str) -> dict[str, Any]:
        first = self.names.setdefault(id(tensor), name)
        self.tensors[first] = tensor
        marks = {
            # Counters that stay on the host, whatever the parameter's device.
            "host": tensor.device.type == "cpu" and self.device.type != "cpu",
            "paged": _is_paged(tensor),
        }
        return {"tensor": first} | {mark: True for mark, applies in marks.items() if applies}

    def _packed(self, packed: Any, name: str) -> dict[str, Any]:
        kind = f"{type(packed).__module__}.{type(packed).__qualname__}"
        if kind not in _packed_classes():
            raise CheckpointError(
                f"The optimiser's {name} is a {kind}, which its package has not registered with torch's "
                "add_safe_globals, so a checkpoint cannot hold it. Choose another optimizer."
            )
        _, context = packed.__tensor_flatten__()
        parts = {part: self.encode(each, name=f"{name}.{part}") for part, each in _parts(packed).items()}
        shape, stride = list(packed.shape), list(packed.stride())
        return {
            "packed": {
                "class": kind,
                "parts": parts,
                "context": self.encode(context, name=name),
                "shape": shape,
                "stride": stride,
            }
        }


class _Decoder:
    """Turns the output of `_Encoder` into values of the current parameter."""

    def __init__(self, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer, self.tensors = optimizer, tensors
        self.parameter: nn.Parameter | None = None
        self.decoded: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            name = value["tensor"]
            if name not in self.decoded:
                self.decoded[name] = self._tensor(self.tensors[name], value)
            return self.decoded[name]
        ((kind, content),) = value.items()
        match kind:
            case "float":
                return float(content)
            case "dtype":
                return getattr(torch, content)
            case "list":
                return [self.decode(each) for each in content]
            case "tuple":
                return tuple(self.decode(each) for each in content)
            case "dict":
                return {name: self.decode(each) for name, each in content.items()}
            case "packed":
                return self._packed(content)
        raise CheckpointError(f"The optimiser state holds a value of the unknown kind {kind!r}.")

    def _tensor(self, tensor: Tensor, marks: Mapping[str, Any]) -> Tensor:
        parameter = self.parameter
        if parameter is not None and "paged" in marks:
            buffer: Tensor = self.optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
            return buffer.copy_(tensor)
        if parameter is None or "host" in marks:
            return tensor
        if is_dtensor(parameter) and tensor.shape == parameter.shape:
            return distribute_like(tensor, like=parameter)
        return tensor.to(parameter.device)

    def _packed(self, content: Mapping[str, Any]) -> Any:
        kind = _packed_classes().get(content["class"])
        if kind is None:
            raise CheckpointError(f"The optimiser state holds a {content['class']}, which is not known here.")
        parts = {name: self.decode(each) for name, each in content["parts"].items()}
        return kind.__tensor_unflatten__(
            parts, self.decode(content["context"]), torch.Size(content["shape"]), tuple(content["stride"])
        )


def _state_of(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Index of a parameter -> its values as JSON."""
    state = {index: dict(values) for index, values in numbers["state"].items()}
    if "shapes" not in numbers:  # earlier versions left the tensors out of the JSON
        for key in tensors:
            index, _, name = key.partition(".")
            state.setdefault(index, {})[name] = {"tensor": key}
    return state


def _check(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], *, parameters: list[nn.Parameter]
) -> None:
    missing = sorted({*numbers.get("tensors", ())} - {*tensors})  # the first versions did not list them
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the optimiser state are missing, first {missing[0]}."
        )
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"Optimiser state {key} is not finite.")
    shapes = [list(parameter.shape) for parameter in parameters]
    saved = numbers.get("shapes")
    if saved is not None and saved != shapes:
        raise CheckpointError(
            f"The optimiser state is that of {len(saved)} parameters, this run has {len(shapes)}, or their "
            "shapes differ."
        )
    if saved is None:
        _check_earlier(tensors, parameters)


def _check_earlier(tensors: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> None:
    """Check a state without the shapes of its parameters: its tensors have them or are numbers."""
    for key, tensor in tensors.items():
        index = int(key.partition(".")[0])
        if index >= len(parameters):
            raise CheckpointError(
                f"Optimiser state {key} belongs to none of the {len(parameters)} parameters."
            )
        if tensor.numel() not in (1, parameters[index].numel()):
            shape = tuple(parameters[index].shape)
            raise CheckpointError(f"Optimiser state {key} does not fit its parameter of shape {shape}.")
