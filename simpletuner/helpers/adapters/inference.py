"""Load an adapter file into a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.pipeline import MaskedDenoising
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.errors import AdapterError, one_line_reason

DENOISER_NAMES = ("unet", "transformer")
PEFT_NAME = "default"
COMPILED_CHILD = "_orig_mod"  # torch.compile(denoiser) keeps the denoiser under this name


def load_into_pipeline(pipeline: Any, file: str | Path, *, strength: float = 1.0) -> LycorisAdapter:
    """Attach the adapter of a file to a pipeline, with the file's rank schedule.

    `masked` adds the rank mask to a pipeline that is not bundled. The returned adapter's `set_strength`
    scales it, `remove_from_pipeline` removes it.

    Raises:
        AdapterError: The pipeline has no known denoiser, or the file cannot be read or does not fit; nothing
            is attached.
    """
    denoiser: nn.Module = getattr(pipeline, _denoiser_name(pipeline))
    denoiser = dict(denoiser.named_children()).get(COMPILED_CHILD, denoiser)
    adapter = load_adapter(denoiser, Path(file), strength=strength)
    if adapter.tlora_config is not None:
        masked(pipeline)._tlora_config = adapter.tlora_config
    return adapter


def load_peft_into_pipeline(pipeline: Any, file: str | Path, *, strength: float = 1.0) -> None:
    """Attach a LoRA in diffusers' format with diffusers' loader, and check that every layer was loaded.

    Raises:
        AdapterError: The file cannot be loaded, or has layers that are not in the pipeline; nothing is
            attached.
    """
    file = Path(file)
    wanted = sum(key.endswith(".lora_A.weight") for key in adapter_file.read(file).tensors)
    denoiser: nn.Module = getattr(pipeline, _denoiser_name(pipeline))
    try:  # from the file itself: diffusers reads rank and alpha from its header
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=PEFT_NAME)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = one_line_reason(error)
        raise AdapterError(f"{file}: diffusers cannot load it: {reason}") from error
    found = sum(isinstance(module, LoraLayer) for module in denoiser.modules())
    if found != wanted:
        pipeline.unload_lora_weights()
        raise AdapterError(
            f"{file}: only {found} of {wanted} layers are in this {type(denoiser).__name__}. The file is for "
            "another model family, or adapts text encoders too."
        )
    pipeline.set_adapters(PEFT_NAME, strength)


def remove_from_pipeline(pipeline: Any, adapter: LycorisAdapter) -> None:
    """Remove an adapter: the denoiser becomes bit-identical to before, other adapters stay."""
    adapter.detach()
    if isinstance(pipeline, MaskedDenoising):
        denoiser: nn.Module = getattr(pipeline, pipeline.denoiser_name)
        layers = (module for module in denoiser.modules() if isinstance(module, TLoraLayer))
        schedule = next((layer.schedule for layer in layers if layer.schedule is not None), None)
        vars(pipeline).pop("_tlora_config", None)
        if schedule is not None:
            pipeline._tlora_config = schedule.config()


def masked(pipeline: Any) -> Any:
    """Add the rank mask to a pipeline in place; `_tlora_config` switches it on.

    The pipeline stays an instance of its class, under the same name. Pipelines made from it by `from_pipe`
    are stock ones and share its denoiser; pass each of them to this function too.

    Raises:
        AdapterError: The pipeline has no known denoiser.
    """
    if not isinstance(pipeline, MaskedDenoising):
        pipeline_class, names = type(pipeline), {"denoiser_name": _denoiser_name(pipeline)}
        # diffusers writes the class name to model_index.json and looks it up when loading.
        pipeline.__class__ = type(
            pipeline_class.__name__,
            (MaskedDenoising, pipeline_class),
            names | {"__doc__": pipeline_class.__doc__, "__module__": pipeline_class.__module__},
        )
    return pipeline


def _denoiser_name(pipeline: Any) -> str:
    found = [name for name in DENOISER_NAMES if isinstance(vars(pipeline).get(name), nn.Module)]
    if not found:
        raise AdapterError(
            f"{type(pipeline).__name__} has no {' or '.join(DENOISER_NAMES)} to attach an adapter to. Pass a "
            "loaded diffusers pipeline, or attach the file to a model with load_adapter."
        )
    return found[0]
