"""The lycoris json: algorithm, strength, targets and arguments of the algorithm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    SerializeAsAny,
    ValidationInfo,
    create_model,
    model_validator,
)

from simpletuner.helpers.choices.algorithms import ALGORITHMS, ARGUMENTS, Argument, argument_aliases
from simpletuner.helpers.choices.registry import ArgumentType
from simpletuner.helpers.configuration.schema.base import (
    Count,
    Names,
    NonNegativeNumber,
    Number,
    OneOf,
    PositiveNumber,
    Section,
    Share,
    Whole,
    contradiction,
)

Algorithm = Annotated[str, OneOf(ALGORITHMS)]
TLoraInit = Literal["random", "weight", "vanilla"]
SigType = Literal["last", "middle", "principal"]
ScheduleVariant = Literal["floor", "inclusive", "cosine", "linear"]
RankScale = Literal["rank", "active"]
FIRST_OWN_MASK_GROUP = 1 << 16
"""First of LyCORIS's mask groups that networks get by default; the user's own are below."""
Scalar = bool | int | float


def _patterns(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _factor(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be at least 1, or -1 for LyCORIS's choice.")
    return value


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("must not be 0, which switches the adapter off.")
    return value


def _min_rank(value: object) -> object:
    """A rank stays a whole number, a share a fraction; 1.0 could mean either."""
    if isinstance(value, str):
        value = _as_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number.")
    if value == 1 and isinstance(value, float):
        raise ValueError(
            "is a rank or a share? Write 1 for one rank, or linear_dim for all of them; a share is below 1, "
            "for instance 0.5."
        )
    if not 0 < value < 1 and (value < 1 or not float(value).is_integer()):
        raise ValueError(
            "must be a rank, a whole number of at least 1, or a share of the rank, above 0 and below 1."
        )
    return value if value < 1 else int(value)


def _as_number(text: str) -> object:
    try:
        return float(text) if set(text) & set(".eE") else int(text)
    except ValueError:
        return text


Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]
MinRank = Annotated[Count | Annotated[float, Field(gt=0, lt=1)], BeforeValidator(_min_rank)]


_TYPES: Mapping[ArgumentType, Any] = {
    "boolean": bool,
    "count": Count,
    "positive": PositiveNumber,
    "number": NonNegativeNumber,
    "fraction": Share,
    "factor": Annotated[Whole, AfterValidator(_factor)],
}


class ArgumentSection(Section):
    """Arguments of LyCORIS's algorithms beside rank and alpha."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        aliases = layer_aliases()
        renamed: dict[object, object] = {}
        for key, value in values.items():
            name = aliases.get(key, key)
            name = name if name in cls.model_fields else key
            if name in renamed:
                raise contradiction(str(key), f"is another name of {name}, which is given too. Keep one.")
            renamed[name] = value
        return renamed


def _is_none(value: object) -> bool:
    return value is None


class LayerArguments(ArgumentSection):
    """Entry of module_algo_map or name_algo_map: these keys and arguments of the algorithm."""

    algo: Algorithm | None = None
    """Algorithm of these layers. Default: the adapter's."""
    dim: Count | None = None
    """Rank of these layers. Also written linear_dim."""
    alpha: PositiveNumber | None = None
    """Alpha of these layers. Also written linear_alpha."""
    tlora_min_rank: MinRank | None = Field(default=None, exclude_if=_is_none)
    """For T-LoRA: active rank of these layers at the highest noise, a rank or a share of each one's own."""
    tlora_alpha: PositiveNumber | None = Field(default=None, exclude_if=_is_none)
    """For T-LoRA: exponent of these layers' rank schedule."""


def layer_aliases() -> dict[str, str]:
    """Other name of an argument of a layer -> its name."""
    return argument_aliases() | {"linear_dim": "dim", "linear_alpha": "alpha"}


def algorithm_arguments() -> type[ArgumentSection]:
    """Section with a field for each argument of the registered algorithms."""
    return _arguments_section(tuple(ARGUMENTS.items()))


@cache
def _arguments_section(arguments: tuple[tuple[str, Argument], ...]) -> type[ArgumentSection]:
    fields: dict[str, Any] = {
        key: (_TYPES[argument.type] | None, Field(default=None, description=_described(argument)))
        for key, argument in arguments
    }
    return create_model(
        "AlgorithmArguments", __base__=ArgumentSection, __doc__=ArgumentSection.__doc__, **fields
    )


def _described(argument: Argument) -> str:
    others = f" Also written {', '.join(argument.aliases)}." if argument.aliases else ""
    return argument.description + others


@cache
def _layer_section(arguments: type[ArgumentSection]) -> type[LayerArguments]:
    # In this order of bases the arguments are the first fields.
    bases = (LayerArguments, cast("type[LayerArguments]", arguments))
    return create_model("LayerArguments", __base__=bases)


def _layer(value: object, info: ValidationInfo) -> LayerArguments:
    if isinstance(value, LayerArguments):
        return value
    return _layer_section(algorithm_arguments()).model_validate(value, context=info.context)


LayerEntry = Annotated[SerializeAsAny[LayerArguments], BeforeValidator(_layer)]


class TargetPreset(Section):
    """Target layers of the adapter."""

    target_module: Names = ()
    """Class names of target layers; Attention and FeedForward stand for the model family's own classes, and
    are the default."""
    target_name: Patterns = ()
    """Module paths of target layers, as regular expressions, or as patterns with use_fnmatch."""
    exclude_name: Patterns = ()
    """Module paths without an adapter, written like target_name."""
    module_algo_map: Mapping[str, LayerEntry] = {}
    """Class name -> algo, dim, alpha and arguments of its layers."""
    name_algo_map: Mapping[str, LayerEntry] = {}
    """Pattern of module paths -> the same for these layers."""
    use_fnmatch: bool = False
    """Read names as file-name patterns (*, ?), not as regular expressions."""
    enable_conv: bool = True
    """Also adapt convolutions with a kernel above 1x1 in the targets."""

    @property
    def entries(self) -> tuple[LayerArguments, ...]:
        """Entries of both maps."""
        return (*self.module_algo_map.values(), *self.name_algo_map.values())

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        keys = {
            "target_name": self.target_name,
            "exclude_name": self.exclude_name,
            "name_algo_map": self.name_algo_map,
        }
        for key, patterns in keys.items() if not self.use_fnmatch else ():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    text = f"{pattern!r} is not a regular expression: {error}. Set use_fnmatch for * and ?."
                    raise contradiction(key, text, "use_fnmatch") from None
        return self


def _is_rank(scale: object) -> bool:
    return scale == "rank"


class LycorisConfig(Section):
    """A LyCORIS adapter; the keys from tlora_min_rank to sig_type are for algo tlora."""

    algo: Algorithm
    """The algorithm."""
    multiplier: Annotated[Number, AfterValidator(_not_zero)]
    """Strength of the adapter in training and afterwards; usually 1."""
    linear_dim: Count
    """Rank; with tlora the highest active rank."""
    linear_alpha: PositiveNumber
    """Scale of the adapter, applied as linear_alpha / linear_dim."""
    apply_preset: TargetPreset = TargetPreset()
    """Target layers."""
    tlora_min_rank: MinRank = 1
    """Active rank at the highest noise: a whole number is a rank, at most linear_dim; a number below 1, such
    as 0.5, is a share of each layer's own rank, rounded down and at least one rank."""
    tlora_alpha: PositiveNumber = 1.0
    """Exponent of the rank schedule; above 1 the active rank falls sooner as noise grows."""
    tlora_schedule: ScheduleVariant = "floor"
    """Rounding of the active rank: floor as in the paper, with the full rank at timestep 0 only; inclusive
    reaches every rank equally often. cosine and linear are those of lora-scripts' forks, to continue their
    adapters: rounded to the nearest, with the active ranks scaled by linear_dim over their number."""
    tlora_scale: RankScale = Field(default="rank", exclude_if=_is_rank)
    """Scale of the adapter at each timestep: rank, linear_alpha / linear_dim whatever is active; active, that
    times linear_dim over the number of active ranks. cosine and linear always do the latter."""
    tlora_init: TLoraInit = "random"
    """Initialisation: random, singular vectors of a random matrix; weight, singular vectors of the layer's
    weight; vanilla, Gaussian and zero as in LoRA. use_data_init true means weight, false random."""
    sig_type: SigType = "last"
    """Singular vectors of the initialisation: the smallest, the middle or the largest."""
    mask_group_id: Annotated[int, Field(ge=0, lt=FIRST_OWN_MASK_GROUP)] | None = None
    """LyCORIS's mask group of the network, for a training loop that sets masks itself: networks of one group
    share a rank mask, and the public functions set group 0. null gives each network its own group."""
    extra: Mapping[str, Scalar] = {}
    """Other arguments of the algorithm, under the names of LyCORIS's constructors."""
    raw: Mapping[str, JsonValue] = {}
    """The user's json, with placeholders for environment variables in texts."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.tlora_min_rank > self.linear_dim:
            raise contradiction(
                "tlora_min_rank",
                f"{self.tlora_min_rank} is above linear_dim {self.linear_dim}. Lower it or raise linear_dim.",
                "linear_dim",
            )
        if self.tlora_schedule in ("cosine", "linear") and self.tlora_alpha != 1:
            raise contradiction(
                "tlora_alpha",
                f"has no meaning with tlora_schedule {self.tlora_schedule}. Omit it.",
                "tlora_schedule",
            )
        if self.tlora_schedule in ("cosine", "linear") and self.tlora_scale == "active":
            raise contradiction(
                "tlora_scale",
                f"is part of tlora_schedule {self.tlora_schedule} already. Omit it.",
                "tlora_schedule",
            )
        return self


COMPUTED_FIELDS = frozenset({"extra", "raw"})
TLORA_FIELDS = (
    "tlora_min_rank",
    "tlora_alpha",
    "tlora_schedule",
    "tlora_scale",
    "tlora_init",
    "sig_type",
    "use_data_init",
    "mask_group_id",
)
