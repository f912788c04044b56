"""The lycoris json: algorithm, strength, targets, and what the chosen algorithm takes beside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from simpletuner.helpers.configuration.schema.base import (
    Count,
    Names,
    NonNegativeNumber,
    Number,
    PositiveNumber,
    Section,
    Share,
    Whole,
    contradiction,
)

Algorithm = Literal[
    "tlora", "lora", "locon", "loha", "lokr", "full", "diag-oft", "boft", "ia3", "glora", "dylora"
]
TLoraInit = Literal["random", "weight", "vanilla"]
SigType = Literal["last", "middle", "principal"]
ScheduleVariant = Literal["floor", "inclusive"]
FIRST_OWN_MASK_GROUP = 1 << 16
"""First of LyCORIS's mask groups that networks get by default; the user's own are below."""
Scalar = bool | int | float

DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
ARGUMENT_ALIASES = {
    "dora_wd": "weight_decompose",
    "wd_on_output": "wd_on_out",
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "constrain": "constraint",
}
"""Other names that LyCORIS gives to an argument -> the name of its constructors."""
LAYER_ALIASES = ARGUMENT_ALIASES | {"linear_dim": "dim", "linear_alpha": "alpha"}

_CONVOLUTION = {"conv_dim", "conv_alpha"}
_COMMON = _CONVOLUTION | {*DROPOUTS, "rank_dropout_scale", "bypass_mode", "train_norm"}
_TWO_FACTORS = {"use_tucker", "use_scalar", "rs_lora"}
_DECOMPOSED = _TWO_FACTORS | {"weight_decompose", "wd_on_out"}
_ORTHOGONAL = {"constraint", "rescaled"}
ALGORITHM_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "tlora": frozenset(_CONVOLUTION),
    "lora": frozenset(_COMMON | _DECOMPOSED),
    "locon": frozenset(_COMMON | _DECOMPOSED),
    "loha": frozenset(_COMMON | _DECOMPOSED),
    "lokr": frozenset(
        _COMMON | _DECOMPOSED | {"factor", "full_matrix", "decompose_both", "unbalanced_factorization"}
    ),
    "full": frozenset(_COMMON),
    "diag-oft": frozenset(_COMMON | _ORTHOGONAL),
    "boft": frozenset(_COMMON | _ORTHOGONAL),
    "ia3": frozenset(_COMMON | {"train_on_input"}),
    "glora": frozenset(_COMMON | _TWO_FACTORS),
    "dylora": frozenset(_COMMON | {"block_size"}),
}
"""Algorithm -> the arguments that change what it does. Source: the constructors of LyCORIS 4.1."""
NETWORK_ONLY_ARGUMENTS = frozenset({*_CONVOLUTION, *DROPOUTS, "train_norm"})
"""Arguments of the whole adapter, which one entry of a map cannot change."""


def _patterns(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _factor(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be at least 1, or -1 to let LyCORIS choose.")
    return value


def _not_zero(value: float) -> float:
    if value == 0:
        raise ValueError("must not be 0, which switches the adapter off.")
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


class AlgorithmArguments(Section):
    """Arguments that LyCORIS algorithms take beside rank and alpha."""

    conv_dim: Count | None = None
    """Rank of convolutions with a kernel above 1x1. Default: linear_dim."""
    conv_alpha: PositiveNumber | None = None
    """Alpha of those convolutions. Default: linear_alpha."""
    dropout: Share | None = None
    """Share of inputs dropped while training."""
    rank_dropout: Share | None = None
    """Share of ranks dropped while training."""
    module_dropout: Share | None = None
    """Share of layers dropped while training."""
    rank_dropout_scale: bool | None = None
    """Scale up the ranks that rank_dropout keeps."""
    bypass_mode: bool | None = None
    """Run beside the base layer instead of changing its weight."""
    train_norm: bool | None = None
    """Train normalisation layers as well."""
    use_tucker: bool | None = None
    """Tucker decomposition of convolution kernels."""
    use_scalar: bool | None = None
    """A trained scalar on each layer's output in place of a zero start."""
    rs_lora: bool | None = None
    """Scale by the square root of the rank."""
    weight_decompose: bool | None = None
    """DoRA: train direction and magnitude apart. Also written dora_wd."""
    wd_on_out: bool | None = None
    """Magnitude per output channel rather than per input channel. Also written wd_on_output."""
    factor: Annotated[Whole, AfterValidator(_factor)] | None = None
    """LoKr: size of the smaller Kronecker factor; -1 chooses the most square one."""
    full_matrix: bool | None = None
    """LoKr: keep the larger factor whole instead of splitting it at linear_dim."""
    decompose_both: bool | None = None
    """LoKr: split the smaller factor too."""
    unbalanced_factorization: bool | None = None
    """LoKr: give the larger factor to the output side."""
    constraint: NonNegativeNumber | None = None
    """OFT: bound on the norm of the rotation; 0 is none."""
    rescaled: bool | None = None
    """OFT: train a scale per output channel too."""
    train_on_input: bool | None = None
    """IA3: scale inputs instead of outputs."""
    block_size: Count | None = None
    """DyLoRA: ranks that are trained at a time."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        renamed: dict[object, object] = {}
        for key, value in values.items():
            name = LAYER_ALIASES.get(key, key) if LAYER_ALIASES.get(key) in cls.model_fields else key
            if name in renamed:
                raise contradiction(str(key), f"is another name of {name}, which is given too. Keep one.")
            renamed[name] = value
        return renamed


class LayerArguments(AlgorithmArguments):
    """What one entry of module_algo_map or name_algo_map changes for its layers."""

    algo: Algorithm | None = None
    """Algorithm of these layers. Default: the adapter's."""
    dim: Count | None = None
    """Rank of these layers. Also written linear_dim."""
    alpha: PositiveNumber | None = None
    """Alpha of these layers. Also written linear_alpha."""


class TargetPreset(Section):
    """Which layers of the denoiser the adapter is for."""

    target_module: Names = ()
    """Class names whose layers are adapted; Attention and FeedForward mean the model family's own classes.
    Without any target these two are taken."""
    target_name: Patterns = ()
    """Regular expressions (or patterns, with use_fnmatch) on module paths."""
    exclude_name: Patterns = ()
    """Module paths that stay as they are, written like target_name."""
    module_algo_map: Mapping[str, LayerArguments] = {}
    """Class name -> what differs for its layers: algo, dim, alpha, arguments of the algorithm."""
    name_algo_map: Mapping[str, LayerArguments] = {}
    """Pattern of module paths -> what differs for these layers."""
    use_fnmatch: bool = False
    """Read names as file-name patterns (*, ?) rather than regular expressions."""
    enable_conv: bool = True
    """Adapt convolutions with a kernel above 1x1 in the targets too."""

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
                    text = f"{pattern!r} is no regular expression: {error}. Set use_fnmatch for * and ?."
                    raise contradiction(key, text, "use_fnmatch") from None
        return self


class LycorisConfig(Section):
    """A LyCORIS adapter; the keys from tlora_min_rank to sig_type are for algo tlora."""

    algo: Algorithm
    """The algorithm; tlora opens fewer ranks the noisier the timestep."""
    multiplier: Annotated[Number, AfterValidator(_not_zero)]
    """Strength of the adapter while training and after it; usually 1."""
    linear_dim: Count
    """Rank: the most ranks that a layer opens."""
    linear_alpha: PositiveNumber
    """Scale of the adapter, applied as linear_alpha / linear_dim."""
    apply_preset: TargetPreset = TargetPreset()
    """Which layers are adapted."""
    tlora_min_rank: Count = 1
    """Ranks left open at the highest noise; at most linear_dim."""
    tlora_alpha: PositiveNumber = 1.0
    """Exponent of the schedule; above 1 ranks close sooner as noise grows."""
    tlora_schedule: ScheduleVariant = "floor"
    """Rounding: floor as in the paper, where the full rank is open at timestep 0 alone; inclusive reaches
    every rank equally often."""
    tlora_init: TLoraInit = "random"
    """Start of the factors: random, singular vectors of a random matrix; weight, of the layer's weight;
    vanilla, Gaussian and zero as in LoRA. use_data_init true means weight, false random."""
    sig_type: SigType = "last"
    """Which singular vectors: the smallest, the middle or the largest."""
    mask_group_id: Annotated[int, Field(ge=0, lt=FIRST_OWN_MASK_GROUP)] | None = None
    """LyCORIS's mask group of the network, for a training loop that sets masks itself: networks of one group
    share theirs, and 0 is what the public functions set. null gives each network a group of its own."""
    extra: Mapping[str, Scalar] = {}
    """The algorithm's other arguments, under the names of LyCORIS's constructors."""
    raw: Mapping[str, JsonValue] = {}
    """The json as the user wrote it."""

    @property
    def uses_tlora(self) -> bool:
        """Whether any layer can be a T-LoRA layer."""
        preset = self.apply_preset
        entries = (*preset.module_algo_map.values(), *preset.name_algo_map.values())
        return self.algo == "tlora" or any(entry.algo == "tlora" for entry in entries)

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.tlora_min_rank > self.linear_dim:
            raise contradiction(
                "tlora_min_rank",
                f"{self.tlora_min_rank} is above linear_dim {self.linear_dim}. Lower it or raise linear_dim.",
                "linear_dim",
            )
        return self


COMPUTED_FIELDS = frozenset({"extra", "raw"})
TLORA_FIELDS = (
    "tlora_min_rank",
    "tlora_alpha",
    "tlora_schedule",
    "tlora_init",
    "sig_type",
    "use_data_init",
    "mask_group_id",
)
