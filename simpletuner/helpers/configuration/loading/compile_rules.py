"""Checks of a compiled denoiser against the rest of config.json."""

from __future__ import annotations

from simpletuner.helpers.configuration.loading.building import Source, Validated
from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.sections import PrecisionConfig, TrainingConfig


def check_compiling(
    compiling: Validated[CompileConfig],
    precision: Validated[PrecisionConfig],
    training: Validated[TrainingConfig],
    *,
    source: Source,
) -> None:
    """Check that nothing replaces weights or tokens within a compiled block."""
    section = compiling.section
    if section is None:
        return
    moved, routed = precision.if_valid("enable_group_offload"), training.if_valid("tread_config")
    problems = []
    if moved is not None and moved.enable_group_offload:
        problems.append("compiled blocks cannot exchange their weights. Set enable_group_offload to false")
    if routed is not None and routed.tread_config is not None:
        problems.append("compiled blocks cannot route tokens. Remove tread_config")
    for text in problems:
        if section.dynamo_backend != "no":
            source.reject("dynamo_backend", section.dynamo_backend, f"{text}, or set this to no.")
        if section.validation_torch_compile:
            source.reject("validation_torch_compile", True, f"{text}, or set this to false.")
