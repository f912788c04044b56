"""Bytes that each optimiser keeps for a float32 parameter. Imports no torch.

Shapes: a matrix is [outputs, inputs], a convolution [outputs, inputs, height, width].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, prod

Shape = tuple[int, ...]
Arguments = Mapping[str, object]
StateBytes = Callable[[Shape, Arguments], int]

FLOAT32 = 4
SMALLEST_8BIT = 4096
"""Numbers below which a parameter keeps states in 32 bits, in bitsandbytes and torchao."""
_BLOCK_8BIT, _BLOCK_4BIT = 256, 128
"""Numbers that share a scale."""
_EVERY_PRODIGYPLUS = 11
"""Of how many numbers prodigyplus keeps one of the start and of the sum."""


def state_bytes(name: str, shape: Shape, arguments: Arguments) -> int:
    """Bytes that an optimiser keeps for one parameter.

    Args:
        name: A name of choices/optimizers; an optimiser of another package counts as AdamW does.
        shape: Of the parameter.
        arguments: Those of the run's optimizer_config; the ones that change the size of a state count.
    """
    return _STATES.get(name, _OF_OTHERS)(shape, arguments)


def _plain(num_states: int, *, counters: int = 0) -> StateBytes:
    """States as large as the parameter, and numbers beside them."""
    return lambda shape, _: FLOAT32 * (num_states * prod(shape) + counters)


def _bitsandbytes(num_states: int) -> StateBytes:
    def of(shape: Shape, arguments: Arguments) -> int:
        numbers = prod(shape)
        if numbers < _number(arguments, "min_8bit_size", SMALLEST_8BIT):
            return FLOAT32 * num_states * numbers
        # A code for each number, a table of 256 values, a scale for each block.
        scales = ceil(numbers / _BLOCK_8BIT)
        return num_states * (numbers + FLOAT32 * (256 + scales))

    return of


def _torchao(bits: int) -> StateBytes:
    def of(shape: Shape, arguments: Arguments) -> int:
        numbers = prod(shape)
        block = _number(arguments, "block_size", _BLOCK_8BIT if bits == 8 else _BLOCK_4BIT)
        if numbers < SMALLEST_8BIT or numbers % block:
            return FLOAT32 * (2 * numbers + 1)
        return 2 * (numbers * bits // 8 + FLOAT32 * ((1 << bits) + numbers // block)) + FLOAT32

    return of


def _last_two_axes(shape: Shape) -> int:
    """Numbers of the means over the last axis and over the one before it."""
    numbers = prod(shape)
    return numbers // shape[-1] + numbers // shape[-2]


def _adafactor(shape: Shape, arguments: Arguments) -> int:
    second = prod(shape) if len(shape) == 1 else _last_two_axes(shape)
    first = prod(shape) if arguments.get("beta1") is not None else 0
    return FLOAT32 * (first + second + 1)


def _came(shape: Shape, _arguments: Arguments) -> int:
    second = prod(shape) if len(shape) == 1 else 2 * _last_two_axes(shape)
    return FLOAT32 * (prod(shape) + second + 1)


def _prodigyplus(shape: Shape, arguments: Arguments) -> int:
    numbers = prod(shape)
    second = numbers
    if len(shape) > 1 and arguments.get("factored") is not False:
        second = sum(numbers // edge for edge in sorted(shape)[-2:])
    samples = 2 * (ceil(numbers / _EVERY_PRODIGYPLUS) + 1)  # bfloat16
    return FLOAT32 * (numbers + second) + samples


def _muon(shape: Shape, _arguments: Arguments) -> int:
    return FLOAT32 * (prod(shape) if len(shape) == 2 else 2 * prod(shape) + 1)


def _number(arguments: Arguments, name: str, default: int) -> int:
    value = arguments.get(name)
    return value if isinstance(value, int) else default


_OF_OTHERS = _plain(2, counters=1)
_STATES: Mapping[str, StateBytes] = {
    "adamw": _OF_OTHERS,
    "bnb-adamw8bit": _bitsandbytes(2),
    "bnb-adamw8bit-paged": _bitsandbytes(2),
    "ao-adamw8bit": _torchao(8),
    "ao-adamw4bit": _torchao(4),
    "adafactor": _adafactor,
    "lion": _plain(1),
    "bnb-lion8bit": _bitsandbytes(1),
    "prodigy": _plain(3, counters=1),
    "prodigyplus": _prodigyplus,
    "adamw_schedulefree": _plain(2),
    "came": _came,
    "stableadamw": _plain(2),
    "muon": _muon,
    "dadaptation": _plain(3),
}
