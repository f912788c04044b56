"""The section of config.json on compiling the denoiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.helpers.configuration.schema.base import Section, none_word


def _backend(value: object) -> object:
    """Accelerate's files have it in capitals."""
    value = none_word(value)
    return value.lower() if isinstance(value, str) else value or "no"


def _mode(value: object) -> object:
    return none_word(value) or "default"


Mode = Annotated[Literal["default", "max-autotune-no-cudagraphs"], BeforeValidator(_mode)]


class CompileConfig(Section):
    """Compiling the denoiser with torch.compile: slow first steps, then fewer and larger kernels."""

    dynamo_backend: Annotated[Literal["no", "inductor", "aot_eager", "eager"], BeforeValidator(_backend)] = (
        "no"
    )
    """What compiles the denoiser in training: inductor makes kernels; aot_eager and eager make none, to find
    errors; no compiles nothing."""
    dynamo_mode: Mode = "default"
    """Mode of inductor: max-autotune-no-cudagraphs tries several kernels for each product, which takes
    minutes."""
    dynamo_use_regional_compilation: bool = True
    """Compile each kind of repeated block once, instead of the whole denoiser, which takes far longer."""
    validation_torch_compile: bool = False
    """Compile the denoiser for validation images too, once for each of their sizes."""
    validation_torch_compile_mode: Mode = "default"
    """The same as dynamo_mode, for validation images."""
