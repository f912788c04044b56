"""Adapter algorithms: PEFT's LoRA (lora_type standard) and those of the lycoris json (`algo`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from simpletuner.helpers.choices.registry import ArgumentType, Choice, Registry


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An argument of LyCORIS's constructors."""

    type: ArgumentType
    description: str
    aliases: tuple[str, ...] = ()
    """Other names that LyCORIS gives it."""
    is_per_layer: bool = True
    """An entry of module_algo_map or name_algo_map can change it for its layers."""


@dataclass(frozen=True, kw_only=True)
class Algorithm(Choice):
    """An algorithm; `build` names the layer class that LyCORIS makes for it."""

    arguments: frozenset[str] = frozenset()
    """Names in ARGUMENTS that change what the algorithm does. Source: the constructors of LyCORIS 4.1."""
    defaults: Mapping[str, object]
    """A lycoris json to start from, without algo, multiplier and apply_preset."""
    needs_dense_weight: bool = False
    """Cannot be trained on a quantised layer: it computes with the layer's own weight, and bypass_mode, which
    adds to the output instead, does not run or does not exist."""
    adds_to_weight: bool = True
    """Changes the layer's weight unless bypass_mode is set; False for one that always adds to the output."""
    takes_multiplier: bool = True
    """Its effect is proportional to a tensor of its files, into which they fold a multiplier other than 1."""
    is_proportional: bool = True
    """Its effect on a layer's output is proportional to its strength, but for DISPROPORTIONATE arguments."""
    has_rank_schedule: bool = False
    """Its active rank depends on the timestep."""
    exports_to_comfyui: bool = False
    """Its layers are two factors, written as a LoRA, or have tensors that ComfyUI reads under other names."""
    rank_axes: Mapping[str, int | None] = field(default_factory=dict)
    """Suffix of a key in its files -> axis of that tensor that is the rank; None for full rank. The
    first suffix of a layer counts."""


ARGUMENTS: dict[str, Argument] = {
    "conv_dim": Argument(
        type="count",
        description="Rank of convolutions with a kernel above 1x1. Default: linear_dim.",
        is_per_layer=False,
    ),
    "conv_alpha": Argument(
        type="positive",
        description="Alpha of those convolutions. Default: linear_alpha.",
        is_per_layer=False,
    ),
    "dropout": Argument(
        type="fraction",
        description="Fraction of the adapter's output dropped in training; needs bypass_mode.",
        is_per_layer=False,
    ),
    "rank_dropout": Argument(
        type="fraction", description="Fraction of ranks dropped in training.", is_per_layer=False
    ),
    "module_dropout": Argument(
        type="fraction", description="Fraction of layers dropped in training.", is_per_layer=False
    ),
    "rank_dropout_scale": Argument(type="boolean", description="Scale up the ranks that rank_dropout keeps."),
    "bypass_mode": Argument(
        type="boolean", description="Add to the base layer's output instead of its weight."
    ),
    "train_norm": Argument(
        type="boolean", description="Train normalisation layers as well.", is_per_layer=False
    ),
    "use_tucker": Argument(
        type="boolean",
        description="Tucker decomposition of convolution kernels.",
        aliases=("use_cp", "use_conv_cp"),
    ),
    "use_scalar": Argument(
        type="boolean", description="Train a scalar on each layer's output in place of a zero start."
    ),
    "rs_lora": Argument(type="boolean", description="Scale by the square root of the rank."),
    "weight_decompose": Argument(
        type="boolean",
        description="DoRA: train direction and magnitude apart.",
        aliases=("dora_wd",),
    ),
    "wd_on_out": Argument(
        type="boolean",
        description="Magnitude per output channel, not per input channel.",
        aliases=("wd_on_output",),
    ),
    "factor": Argument(
        type="factor",
        description="LoKr: size of the smaller Kronecker factor; -1 chooses the most square one.",
    ),
    "full_matrix": Argument(
        type="boolean",
        description="LoKr: keep the larger factor whole instead of splitting it at linear_dim.",
    ),
    "decompose_both": Argument(type="boolean", description="LoKr: split the smaller factor too."),
    "unbalanced_factorization": Argument(
        type="boolean", description="LoKr: give the larger factor to the output side."
    ),
    "constraint": Argument(
        type="number",
        description="OFT: bound on the norm of the rotation; 0 for no bound.",
        aliases=("constrain",),
    ),
    "rescaled": Argument(type="boolean", description="OFT: train a scale per output channel too."),
    "train_on_input": Argument(type="boolean", description="IA3: scale inputs instead of outputs."),
    "block_size": Argument(type="count", description="DyLoRA: ranks that are trained at a time."),
}
"""Name in LyCORIS's constructors -> argument."""
DISPROPORTIONATE = ("weight_decompose", "rescaled")
"""Arguments with which the effect is not proportional to the strength: the magnitudes have none."""
DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


def idle_options(algo: str, options: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(Option, reason) for each option that has no effect beside the others of a layer.

    Args:
        algo: The layer's algorithm.
        options: Its arguments, without those that the algorithm does not take.

    Source: the forward passes of LyCORIS 4.1.
    """
    on = {name for name, value in options.items() if value}
    bypass = "bypass_mode" in on
    if bypass and "weight_decompose" in on:
        yield (
            "bypass_mode",
            "adds to the output, where weight_decompose has no effect. Remove one of the two.",
        )
    if "dropout" in on and not bypass:
        instead = "rank_dropout or module_dropout"
        yield "dropout", f"has no effect without bypass_mode. Set that to true, or use {instead}."
    if "rank_dropout" in on and algo in _RANK_DROPOUT_IN and bypass is not _RANK_DROPOUT_IN[algo]:
        needed = "without" if _RANK_DROPOUT_IN[algo] else "with"
        yield "rank_dropout", f"has no effect in {algo} {needed} bypass_mode. Use module_dropout."
    if "rank_dropout_scale" in on and "rank_dropout" not in on:
        yield "rank_dropout_scale", "has no effect without rank_dropout. Set that too, or remove it."
    if options.get("wd_on_out") is False and "weight_decompose" not in on:
        yield "wd_on_out", "has no effect without weight_decompose. Set that too, or remove it."
    for name in sorted({"decompose_both", "use_tucker"} & on if "full_matrix" in on else ()):
        yield name, "has no effect with full_matrix, which splits no factor. Remove one of the two."


_RANK_DROPOUT_IN = {"glora": True, "lokr": False, "diag-oft": False}
"""Algorithm -> bypass_mode with which it drops ranks; in the others both do."""

_CONVOLUTION = frozenset({"conv_dim", "conv_alpha"})
_EVERY = frozenset({"module_dropout", "train_norm"})
_RANK_DROPOUT = frozenset({"rank_dropout", "rank_dropout_scale"})
_BYPASS = frozenset({"bypass_mode", "dropout"})  # LyCORIS's dropout works under bypass_mode only
_TWO_FACTORS = _EVERY | _CONVOLUTION | _RANK_DROPOUT | _BYPASS | {"use_scalar", "rs_lora"}
_DECOMPOSED = _TWO_FACTORS | {"use_tucker", "weight_decompose", "wd_on_out"}
_ORTHOGONAL = _EVERY | {"conv_dim", "bypass_mode", "constraint", "rescaled"}


def _size(dim: int, alpha: float, **arguments: object) -> dict[str, object]:
    return {"linear_dim": dim, "linear_alpha": alpha, **arguments}


_LAYERS = "simpletuner.helpers.adapters.lycoris_layers"
# Above every layer's size: LoKr then keeps its larger factor whole, and factor alone decides its size.
_LOKR_WHOLE = 10_000

STANDARD = Algorithm(
    name="standard",
    display_name="LoRA",
    summary="LoRA by PEFT.",
    build="simpletuner.helpers.adapters.peft_lora:PeftAdapter",
    defaults={},
    adds_to_weight=False,
    exports_to_comfyui=True,
)
"""The algorithm of lora_type standard, which has no lycoris json."""

WHOLE_MODEL = Algorithm(
    name="whole_model",
    display_name="Full fine-tune",
    summary="The weights of the denoiser.",
    build="simpletuner.helpers.models.whole_model:WholeModel",
    defaults={},
)
"""What model_type full trains, without an adapter."""

NEW_TOKEN = Algorithm(
    name="new_token",
    display_name="Textual inversion",
    summary="The embeddings of a new token in the text encoders.",
    build="simpletuner.helpers.adapters.new_tokens:NewToken",
    defaults={},
)
"""What model_type embedding trains, without an adapter."""

ALGORITHMS = Registry(
    Algorithm(
        name="tlora",
        display_name="T-LoRA",
        summary="Fewer active ranks the noisier the timestep.",
        build="simpletuner.helpers.adapters.tlora.layer:TLoraLayer",
        arguments=_CONVOLUTION,
        defaults=_size(
            64,
            64.0,
            tlora_min_rank=32,
            tlora_alpha=1.0,
            tlora_schedule="floor",
            tlora_init="random",
            sig_type="last",
        ),
        adds_to_weight=False,
        has_rank_schedule=True,
        exports_to_comfyui=True,
        rank_axes={".q_layer.weight": 0},
    ),
    Algorithm(
        name="lora",
        display_name="LoRA",
        summary="LoRA by LyCORIS.",
        build=f"{_LAYERS}:LoConLayer",
        arguments=_DECOMPOSED,
        defaults=_size(16, 16.0),
        exports_to_comfyui=True,
    ),
    Algorithm(
        name="locon",
        display_name="LoCon",
        summary="The same layer, named for LoRA with convolutions.",
        build=f"{_LAYERS}:LoConLayer",
        arguments=_DECOMPOSED,
        defaults=_size(16, 16.0, conv_dim=8, conv_alpha=8.0),
        exports_to_comfyui=True,
    ),
    Algorithm(
        name="loha",
        display_name="LoHa",
        summary="Hadamard product of two LoRAs.",
        build=f"{_LAYERS}:LohaLayer",
        arguments=_DECOMPOSED,
        defaults=_size(8, 8.0),
        exports_to_comfyui=True,
        rank_axes={".hada_w1_b": 0},
    ),
    Algorithm(
        name="lokr",
        display_name="LoKr",
        summary="Kronecker product of two factors.",
        build=f"{_LAYERS}:LokrLayer",
        arguments=_DECOMPOSED | {"factor", "full_matrix", "decompose_both", "unbalanced_factorization"},
        defaults=_size(_LOKR_WHOLE, 1.0, factor=16),
        exports_to_comfyui=True,
        rank_axes={".lokr_w2_b": 0, ".lokr_w1_b": 0, ".lokr_w2": None},
    ),
    Algorithm(
        name="tlokr",
        display_name="T-LoKr",
        summary="LoKr with fewer active ranks of its larger factor the noisier the timestep.",
        build="simpletuner.helpers.adapters.tlora.lokr_layer:TLokrLayer",
        arguments=_CONVOLUTION | {"factor", "decompose_both", "unbalanced_factorization"},
        defaults=_size(16, 16.0, factor=8, tlora_min_rank=8, tlora_alpha=1.0, tlora_schedule="floor"),
        adds_to_weight=False,
        has_rank_schedule=True,
        exports_to_comfyui=True,
    ),
    Algorithm(
        name="full",
        summary="The whole weight and bias.",
        build=f"{_LAYERS}:FullLayer",
        arguments=_EVERY | _RANK_DROPOUT,
        defaults=_size(1, 1.0),
        needs_dense_weight=True,
        rank_axes={".diff": None},
    ),
    Algorithm(
        name="diag-oft",
        summary="Rotations of blocks of outputs.",
        build="lycoris.modules.diag_oft:DiagOFTModule",
        arguments=_ORTHOGONAL | {"rank_dropout"},
        defaults=_size(8, 1.0, constraint=0.0, rescaled=False),
        takes_multiplier=False,
        rank_axes={".oft_blocks": None},
    ),
    Algorithm(
        name="boft",
        summary="Rotations as butterfly factors.",
        build="lycoris.modules.boft:ButterflyOFTModule",
        arguments=_ORTHOGONAL,
        defaults=_size(10, 1.0, constraint=0.0, rescaled=False),
        takes_multiplier=False,
        is_proportional=False,
        rank_axes={".oft_blocks": None},
    ),
    Algorithm(
        name="ia3",
        summary="A scale per output or input.",
        build=f"{_LAYERS}:IA3Layer",
        arguments=_EVERY | {"bypass_mode", "train_on_input"},
        defaults=_size(1, 1.0, train_on_input=False),
        takes_multiplier=False,
        needs_dense_weight=True,
        rank_axes={".on_input": None},
    ),
    Algorithm(
        name="glora",
        display_name="GLoRA",
        summary="Factors on the weight and beside it.",
        build=f"{_LAYERS}:GLoraLayer",
        arguments=_TWO_FACTORS,
        defaults=_size(8, 8.0),
        rank_axes={".a2.weight": 0},
    ),
    Algorithm(
        name="dylora",
        display_name="DyLoRA",
        summary="LoRA that trains one block of ranks at a time.",
        build=f"{_LAYERS}:DyLoraLayer",
        arguments=_EVERY | _CONVOLUTION | {"block_size"},
        defaults=_size(16, 16.0, block_size=4),
        # LyCORIS's bypass shapes the drawn blocks as if all ranks were drawn, and fails. A DyLoRA file loads
        # on a quantised model all the same: its keys are a LoRA's, so LyCORIS makes LoRA layers of it.
        needs_dense_weight=True,
        exports_to_comfyui=True,
    ),
)


def display_name_of(name: str) -> str:
    """Title of an algorithm, of lora_type standard or of a model_type; an unknown name as it is."""
    known = {**ALGORITHMS, **{each.name: each for each in (STANDARD, WHOLE_MODEL, NEW_TOKEN)}}
    return known[name].title if name in known else name


def argument_aliases() -> dict[str, str]:
    """Other name of an argument -> its name in LyCORIS's constructors."""
    return {alias: name for name, argument in ARGUMENTS.items() for alias in argument.aliases}
