"""Values that users write on one line: sizes, trackers, arguments of an optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationInfo

from simpletuner.helpers.choices.optimizers import OPTIMIZERS, Optimizer
from simpletuner.helpers.choices.registry import ArgumentType
from simpletuner.helpers.configuration.text.problems import nearest
from simpletuner.helpers.contracts import Size

OptimizerArgument = bool | int | float | str | tuple[float, ...]
LARGEST_IMAGE_PX = 8192
_NUMBERS = {2: "two", 3: "three"}
_SIZE = re.compile(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?")

LONGEST_REPOSITORY = 96
_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(?<![-.])", re.ASCII)
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?", re.IGNORECASE)


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


def numbers(value: object) -> object:
    """Numbers from "0.1,0.5", the same in brackets, a single number or a list of these."""
    if isinstance(value, str):
        return [part for part in value.strip(" []").split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def trackers(value: object) -> object:
    """Tracker names from a comma-separated text or a list, without "none"."""
    if value is None:
        return ()
    names: object = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Sequence):
        return names
    plain = [name.strip().lower() if isinstance(name, str) else name for name in names]
    return tuple(dict.fromkeys(name for name in plain if name not in ("", "none")))


def hub_repository(value: object) -> object:
    """A repository of the hub, owner/name or name, also from its address; None for no value.

    Raises:
        ValueError: The hub refuses such a name.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    address = _HUB_ADDRESS.match(text)
    if address is not None:
        parts = re.split(r"[?#]", text[address.end() :])[0].split("/")
        # The address of a dataset or a space stays whole, which no repository's name is.
        text = text if parts[0] in ("datasets", "spaces") else "/".join(parts[:2]).rstrip("/")
    if not text:
        return None
    if problem := repository_problem(text):
        raise ValueError(problem)
    return text


def repository_problem(name: str) -> str | None:
    """Why the hub refuses a repository's name; None for a valid one.

    Source: the rules of huggingface_hub's validate_repo_id.
    """
    if len(name) > LONGEST_REPOSITORY:
        return f"has {len(name)} characters; a repository's name has at most {LONGEST_REPOSITORY}."
    if not _REPOSITORY.fullmatch(name):
        return (
            "must be owner/name or name, of letters, digits, -, _ and . that begin with a letter, digit or _ "
            "and do not end with - or a dot."
        )
    if "--" in name or ".." in name:
        return "must not have -- or .. in it."
    return "must not end with .git." if name.endswith(".git") else None


def arguments_of_optimizer(value: object, info: ValidationInfo) -> dict[str, OptimizerArgument]:
    """The value of optimizer_config, beside a valid optimizer.

    Raises:
        ValueError: See `optimizer_arguments`.
    """
    record = OPTIMIZERS.get(info.data.get("optimizer", ""))
    has_betas = record is not None and "betas" in record.arguments
    return optimizer_arguments(value, betas=record.betas if record is not None and has_betas else ())


def optimizer_arguments(value: object, *, betas: Sequence[float]) -> dict[str, OptimizerArgument]:
    """Arguments from "name=value,name=value" or an object; beta1, beta2 and so on become betas.

    Args:
        value: As it stands in the configuration.
        betas: Their defaults in the optimiser; empty if it has no argument betas.

    Raises:
        ValueError: A part is not name=value, or a value is not a number, true, false, a text or a list.
    """
    if value is None or value == "":
        return {}
    pairs = _pairs(value) if isinstance(value, str) else value
    if not isinstance(pairs, Mapping):
        raise ValueError('must be an object or a text such as "weight_decay=0.01,eps=1e-8".')
    arguments = {str(name): _argument(each) for name, each in pairs.items()}
    every = {f"beta{index}": beta for index, beta in enumerate(betas, start=1)}
    single = {name: arguments.pop(name) for name in every if name in arguments}
    if single:
        if "betas" in arguments:
            raise ValueError("gives betas twice. Keep betas, or beta1 and beta2.")
        arguments["betas"] = tuple(_number(beta) for beta in (every | single).values())
    return arguments


def optimizer_problem(optimizer: str, arguments: Mapping[str, OptimizerArgument]) -> str | None:
    """The arguments that the optimiser does not take, each with the reason; None if it takes all."""
    problems = [_problem(OPTIMIZERS[optimizer], name, value) for name, value in arguments.items()]
    return " ".join(problem for problem in problems if problem) or None


def _problem(record: Optimizer, name: str, value: OptimizerArgument) -> str | None:
    known = record.arguments
    if name in ("lr", "learning_rate"):
        return f"{name} is not set here. Use the key learning_rate."
    if name not in known:
        return f"{name} is no argument of {record.name}.{nearest(name, known)} It takes {', '.join(known)}."
    if reason := _argument_problem(value, known[name], num_betas=len(record.betas)):
        return f"{name} {reason}"
    if record.has_averages and isinstance(value, tuple) and value[0] == 0:
        return "beta1 must be above 0: the averages are computed with 1 / beta1."
    return None


def _argument_problem(value: OptimizerArgument, argument_type: ArgumentType, *, num_betas: int) -> str | None:
    if argument_type == "boolean":
        return None if isinstance(value, bool) else "must be true or false."
    if argument_type == "betas":
        fits = isinstance(value, tuple) and len(value) == num_betas and all(0 <= beta < 1 for beta in value)
        return None if fits else f"must be {_NUMBERS[num_betas]} numbers from 0 to below 1."
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return "must be a number of at least 0."
    fits, requirement = {
        "count": (isinstance(value, int) and value > 0, "a whole number of at least 1"),
        "count or zero": (isinstance(value, int), "a whole number of at least 0"),
        "positive": (value > 0, "a number above 0"),
        "fraction": (value < 1, "a number from 0 to below 1"),
    }.get(argument_type, (True, ""))
    return None if fits else f"must be {requirement}."


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
