"""Optimisers: the values of `optimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simpletuner.helpers.choices.registry import ArgumentType, Choice, Registry


@dataclass(frozen=True, kw_only=True)
class Optimizer(Choice):
    """An optimiser; `build` names its class, called with the parameters, `lr` and the arguments."""

    arguments: Mapping[str, ArgumentType]
    """Keys of optimizer_config, under the names of the class."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """The class's default of its argument betas; a configuration may set one of them, as beta1 or beta2."""
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    default_learning_rate: float = 1e-4
    fused_devices: tuple[str, ...] = ()
    """Device types with a fused kernel: one for all parameters instead of several for each."""
    has_averages: bool = False
    """Whether images and adapter files use averages of the weights, which its `eval()` computes."""
    trains_shards: bool = False
    """Whether it trains parameters that FSDP shards."""
    needs_all_gradients: bool = False
    """Whether the step of a weight depends on the gradients of others, so that all are stepped at once."""


_ADAM: Mapping[str, ArgumentType] = {"betas": "betas", "eps": "number", "weight_decay": "number"}
_BITSANDBYTES: Mapping[str, ArgumentType] = {"min_8bit_size": "count"}
_TORCHAO: Mapping[str, ArgumentType] = {"block_size": "count"}
_PRODIGY: Mapping[str, ArgumentType] = {
    **_ADAM,
    "eps": "positive",
    "beta3": "fraction",
    "d0": "positive",
    "d_coef": "positive",
}

OPTIMIZERS = Registry(
    Optimizer(
        name="adamw",
        display_name="AdamW",
        summary="AdamW of torch.",
        aliases=("AdamW",),
        build="torch.optim:AdamW",
        arguments=_ADAM,
        fused_devices=("cuda", "cpu", "xpu", "mps"),
        trains_shards=True,
    ),
    Optimizer(
        name="bnb-adamw8bit",
        display_name="AdamW 8-bit",
        summary="AdamW with 8-bit state; parameters below min_8bit_size weights keep 32 bits.",
        aliases=("adamw8bit", "AdamW8bit"),
        build="bitsandbytes.optim:AdamW8bit",
        package="bitsandbytes",
        extra="optim",
        arguments={**_ADAM, **_BITSANDBYTES},
    ),
    Optimizer(
        name="bnb-adamw8bit-paged",
        display_name="AdamW 8-bit, paged",
        summary="The same, and a GPU pages large state to the host when its memory is full.",
        aliases=("PagedAdamW8bit", "pagedadamw8bit"),
        build="bitsandbytes.optim:PagedAdamW8bit",
        package="bitsandbytes",
        extra="optim",
        arguments={**_ADAM, **_BITSANDBYTES},
    ),
    Optimizer(
        name="ao-adamw8bit",
        display_name="AdamW 8-bit (torchao)",
        summary="AdamW with 8-bit state in blocks of block_size; its step is compiled, by a C++ compiler.",
        build="torchao.optim:AdamW8bit",
        package="torchao",
        extra="optim",
        arguments={**_ADAM, **_TORCHAO},
    ),
    Optimizer(
        name="ao-adamw4bit",
        display_name="AdamW 4-bit",
        summary="AdamW with 4-bit state in blocks of block_size; its step is compiled, by a C++ compiler.",
        build="torchao.optim:AdamW4bit",
        package="torchao",
        extra="optim",
        arguments={**_ADAM, **_TORCHAO},
    ),
    Optimizer(
        name="adafactor",
        display_name="Adafactor",
        summary="Factored second moment: a row and a column for each matrix; beta1 adds a first moment.",
        aliases=("Adafactor", "AdaFactor"),
        build="transformers.optimization:Adafactor",
        arguments={"beta1": "fraction", "clip_threshold": "positive", "weight_decay": "number"},
        # The learning rate is the one that is configured.
        defaults={"scale_parameter": False, "relative_step": False},
    ),
    Optimizer(
        name="lion",
        display_name="Lion",
        summary="Steps along the sign of a moving average: one state instead of AdamW's two.",
        aliases=("Lion", "optimi-lion"),
        build="pytorch_optimizer:Lion",
        package="pytorch_optimizer",
        extra="optim",
        arguments={"betas": "betas", "weight_decay": "number"},
        betas=(0.9, 0.99),
        default_learning_rate=2e-5,
    ),
    Optimizer(
        name="bnb-lion8bit",
        display_name="Lion 8-bit",
        summary="Lion with 8-bit state; parameters below min_8bit_size weights keep 32 bits.",
        aliases=("lion8bit", "Lion8bit"),
        build="bitsandbytes.optim:Lion8bit",
        package="bitsandbytes",
        extra="optim",
        arguments={"betas": "betas", "weight_decay": "number", **_BITSANDBYTES},
        betas=(0.9, 0.99),
        default_learning_rate=2e-5,
    ),
    Optimizer(
        name="prodigy",
        display_name="Prodigy",
        summary="Estimates its own step size, which learning_rate scales.",
        aliases=("Prodigy",),
        build="prodigyopt:Prodigy",
        package="prodigyopt",
        extra="optim",
        arguments={
            **_PRODIGY,
            "decouple": "boolean",
            "use_bias_correction": "boolean",
            "safeguard_warmup": "boolean",
            "growth_rate": "number",
        },
        # Source: README of prodigyopt, for diffusion models.
        defaults={"use_bias_correction": True, "safeguard_warmup": True},
        default_learning_rate=1.0,
        trains_shards=True,
        needs_all_gradients=True,
    ),
    Optimizer(
        name="prodigyplus",
        display_name="Prodigy Plus Schedule-Free",
        summary="Prodigy with factored state and schedule-free averages of the weights.",
        aliases=("prodigy_plus", "ProdigyPlusScheduleFree", "prodigyplus.ProdigyPlusScheduleFree"),
        build="prodigyplus.prodigy_plus_schedulefree:ProdigyPlusScheduleFree",
        package="prodigyplus",
        extra="optim",
        arguments={
            **_PRODIGY,
            **dict.fromkeys(("d_limiter", "factored", "use_bias_correction", "use_stableadamw"), "boolean"),
            **dict.fromkeys(("use_schedulefree", "use_speed", "weight_decay_by_lr"), "boolean"),
            **dict.fromkeys(("use_cautious", "use_grams", "use_adopt", "use_orthograd"), "boolean"),
            "prodigy_steps": "count or zero",
            "schedulefree_c": "number",
        },
        betas=(0.9, 0.99),
        # All parameters are one group.
        defaults={"split_groups": False},
        default_learning_rate=1.0,
        has_averages=True,
        needs_all_gradients=True,
    ),
    Optimizer(
        name="adamw_schedulefree",
        display_name="AdamW Schedule-Free",
        summary="AdamW that averages the weights instead of lowering the learning rate.",
        aliases=("AdamWScheduleFree",),
        build="pytorch_optimizer:ScheduleFreeAdamW",
        package="pytorch_optimizer",
        extra="optim",
        arguments={**_ADAM, "r": "number", "weight_lr_power": "number"},
        has_averages=True,
    ),
    Optimizer(
        name="came",
        display_name="CAME",
        summary="Adafactor with a first moment and a measure of confidence in it.",
        aliases=("CAME",),
        build="pytorch_optimizer:CAME",
        package="pytorch_optimizer",
        extra="optim",
        arguments={
            "betas": "betas",
            "weight_decay": "number",
            "clip_threshold": "positive",
            "eps1": "number",
            "eps2": "number",
        },
        betas=(0.9, 0.999, 0.9999),
        # Its averages start at 0 without a correction: 11 times AdamW's step at the start and at step 100, 4
        # times at step 1,000.
        default_learning_rate=2e-5,
    ),
    Optimizer(
        name="stableadamw",
        display_name="StableAdamW",
        summary="AdamW with Adafactor's clipping of the step: a spike of the gradient matters less.",
        aliases=("optimi-stableadamw", "StableAdamW"),
        build="pytorch_optimizer:StableAdamW",
        package="pytorch_optimizer",
        extra="optim",
        arguments=_ADAM,
        betas=(0.9, 0.99),
    ),
    Optimizer(
        name="muon",
        display_name="Muon",
        summary="Orthogonalised momentum for matrices; AdamW for all other parameters.",
        aliases=("Muon",),
        build="simpletuner.helpers.training.muon:Muon",
        arguments={
            **_ADAM,
            "momentum": "fraction",
            "nesterov": "boolean",
            "ns_steps": "count",
        },
        needs_all_gradients=True,
    ),
    Optimizer(
        name="dadaptation",
        display_name="D-Adaptation",
        summary="Adam that estimates its own step size, which learning_rate scales.",
        aliases=("dadapt", "dadaptadam", "DAdaptAdam"),
        build="pytorch_optimizer:DAdaptAdam",
        package="pytorch_optimizer",
        extra="optim",
        arguments={
            **_ADAM,
            "d0": "positive",
            "growth_rate": "number",
            "weight_decouple": "boolean",
            "bias_correction": "boolean",
        },
        # The decay of AdamW instead of a penalty in the gradient, as in prodigy.
        defaults={"weight_decouple": True},
        default_learning_rate=1.0,
        needs_all_gradients=True,
    ),
)
