"""torch.compile of a denoiser, in place: its modules, parameters and their names stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo.config as dynamo

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.configuration.schema.compiling import CompileConfig

# Each kind of block has a graph for every bucket and width, in training and in evaluation, with and without
# the adapter. Beyond torch's limit of 8 it would run uncompiled without an error.
MOST_GRAPHS = 256


def compile_for_training(denoiser: nn.Module, config: CompileConfig) -> None:
    """Compile the denoiser for its next calls, if the run asks for it.

    Shapes are fixed: every bucket has graphs of its own. The rank mask is an input of a graph, so a new
    timestep needs no other one.
    """
    if config.dynamo_backend != "no":
        _compile(denoiser, config, backend=config.dynamo_backend, mode=config.dynamo_mode)


@contextmanager
def compiled_for_validation(denoiser: nn.Module, config: CompileConfig) -> Iterator[None]:
    """Run the denoiser compiled within the context if the run asks for it, else uncompiled."""
    if not config.validation_torch_compile:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    before = {module: module._compiled_call_impl for module in denoiser.modules()}
    backend = "inductor" if config.dynamo_backend == "no" else config.dynamo_backend
    _compile(denoiser, config, backend=backend, mode=config.validation_torch_compile_mode)
    try:
        yield
    finally:
        for module, call in before.items():
            if module._compiled_call_impl is not call:  # on the others it is no attribute of their own
                module._compiled_call_impl = call


def _compile(denoiser: Any, config: CompileConfig, *, backend: str, mode: str) -> None:
    # A T-LoRA layer is a forward hook. Unless hooks are compared too, a block without one and a block with
    # one share a graph, and the adapter of the second is left out.
    dynamo.skip_nnmodule_hook_guards = False
    options: dict[str, object] = {"backend": backend, "dynamic": False, "recompile_limit": MOST_GRAPHS}
    if backend == "inductor":
        options["mode"] = mode
    if config.dynamo_use_regional_compilation:
        denoiser.compile_repeated_blocks(**options)
    else:
        denoiser.compile(**options)
