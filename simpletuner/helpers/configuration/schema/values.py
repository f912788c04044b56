"""Values that users write on one line: sizes, trackers, arguments of an optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.registry import ArgumentType
from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.contracts import Size

OptimizerArgument = bool | int | float | str | tuple[float, ...]
LARGEST_IMAGE_PX = 8192
_SIZE = re.compile(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?")
_BETAS = ("beta1", "beta2")
_DEFAULT_BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True)
class DifferingDefault:
    """A key that is left out and that SimpleTuner would give another value."""

    key: str
    ours: str
    theirs: str


_OFF = ("false", "none", "null", "", "0", "0.0", "off", "no")


def is_off(value: object) -> bool:
    """Whether a value switches a feature off."""
    if isinstance(value, str | bool | int | float):
        return value == 0 or str(value).strip().lower() in _OFF
    return value in (None, [], {})


def sizes(value: object) -> tuple[Size, ...]:
    """Sizes from 1024, "1024", "1024x768" (width x height), a comma-separated text or a list of these.

    Raises:
        ValueError: A part is not a size.
    """
    if value is None:
        return ()
    if isinstance(value, Size):
        return (value,)
    if isinstance(value, str):
        parts: Iterable[object] = [part for part in value.split(",") if part.strip()]
    else:
        parts = value if isinstance(value, Sequence) else [value]
    return tuple(_size(part) for part in parts)


def _size(part: object) -> Size:
    if isinstance(part, Size):
        return part
    match = None if isinstance(part, bool) else _SIZE.fullmatch(str(part))
    if match is None:
        raise ValueError(
            'must be an edge in pixels or width x height, for instance 1024 or "1024x768,768x1024".'
        )
    width, height = int(match.group(1)), int(match.group(2) or match.group(1))
    if not (1 <= width <= LARGEST_IMAGE_PX and 1 <= height <= LARGEST_IMAGE_PX):
        raise ValueError(f"must be from 1 to {LARGEST_IMAGE_PX} pixels wide and high.")
    return Size(height=height, width=width)


def trackers(value: object) -> object:
    """Tracker names from a comma-separated text or a list, without "none"."""
    if value is None:
        return ()
    names: object = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Sequence):
        return names
    plain = [name.strip().lower() if isinstance(name, str) else name for name in names]
    return tuple(dict.fromkeys(name for name in plain if name not in ("", "none")))


def optimizer_arguments(value: object) -> dict[str, OptimizerArgument]:
    """Arguments from "name=value,name=value" or an object; beta1 and beta2 become betas.

    Raises:
        ValueError: A part is not name=value, or a value is not a number, true, false, a text or a list.
    """
    if value is None or value == "":
        return {}
    pairs = _pairs(value) if isinstance(value, str) else value
    if not isinstance(pairs, Mapping):
        raise ValueError('must be an object or a text such as "weight_decay=0.01,eps=1e-8".')
    arguments = {str(name): _argument(each) for name, each in pairs.items()}
    single = {name: arguments.pop(name) for name in _BETAS if name in arguments}
    if single:
        if "betas" in arguments:
            raise ValueError("gives betas twice. Keep betas, or beta1 and beta2.")
        both = dict(zip(_BETAS, _DEFAULT_BETAS, strict=True)) | single
        arguments["betas"] = tuple(_number(both[name]) for name in _BETAS)
    return arguments


def optimizer_problem(optimizer: str, arguments: Mapping[str, OptimizerArgument]) -> str | None:
    """The first argument that the optimiser does not take, with the reason; None if it takes all."""
    known = OPTIMIZERS[optimizer].arguments
    for name, value in arguments.items():
        if name in ("lr", "learning_rate"):
            return f"{name} is not set here. Use the key learning_rate."
        if name not in known:
            return f"{name} is no argument of {optimizer}.{nearest(name, known)} It takes {', '.join(known)}."
        if reason := _argument_problem(value, known[name]):
            return f"{name} {reason}"
    return None


def _argument_problem(value: OptimizerArgument, argument_type: ArgumentType) -> str | None:
    if argument_type == "boolean":
        return None if isinstance(value, bool) else "must be true or false."
    if argument_type == "betas":
        fits = isinstance(value, tuple) and len(value) == 2 and all(0 <= beta < 1 for beta in value)
        return None if fits else "must be two numbers from 0 to below 1."
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return "must be a number of at least 0."
    return None


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    # A comma before a bare value or inside brackets belongs to a list: betas=0.9,0.99
    for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*=)", text.strip().strip(",")):
        name, equals, value = part.partition("=")
        name = name.strip().lstrip("-")
        if not equals or not name or not value.strip():
            raise ValueError('must be name=value,name=value, for instance "weight_decay=0.01,eps=1e-8".')
        if name in pairs:
            raise ValueError(f"gives {name} twice.")
        pairs[name] = value.strip()
    return pairs


def _argument(value: object) -> OptimizerArgument:
    if isinstance(value, list | tuple):
        return tuple(_number(each) for each in value)
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str):
        raise ValueError("values must be numbers, true, false, text or lists of numbers.")
    lowered = value.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    inner = value.strip("()[] ")
    if "," in inner or inner != value:
        return tuple(_number(part) for part in inner.split(",") if part.strip())
    try:
        return int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    except ValueError:
        return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("lists must hold numbers.")
    try:
        return float(value)
    except ValueError:
        raise ValueError("lists must hold numbers.") from None
