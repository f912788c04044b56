"""An adapter file in any diffusers pipeline, by one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.network import LycorisAdapter, load_adapter
from simpletuner.helpers.adapters.pipeline import MaskedDenoising
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from simpletuner.helpers.errors import AdapterError

DENOISER_NAMES = ("unet", "transformer")
PEFT_NAME = "default"
COMPILED_CHILD = "_orig_mod"  # where torch.compile(denoiser) keeps the denoiser


def load_into_pipeline(pipeline: Any, file: str | Path, *, strength: float = 1.0) -> LycorisAdapter:
    """Attach the adapter of a file to a pipeline, with the rank schedule that the file states.

    A pipeline that is not one of the bundled ones becomes one that opens the ranks of each step, as `masked`
    makes it. `set_strength` of what is returned scales the adapter, `remove_from_pipeline` takes it off.

    Raises:
        AdapterError: The pipeline has no denoiser that is known, or the file cannot be read or does not fit;
            nothing is attached.
    """
    denoiser: nn.Module = vars(pipeline)[_denoiser_name(pipeline)]
    denoiser = dict(denoiser.named_children()).get(COMPILED_CHILD, denoiser)
    adapter = load_adapter(denoiser, Path(file), strength=strength)
    if adapter.tlora_config is not None:
        masked(pipeline)._tlora_config = adapter.tlora_config
    return adapter


def load_peft_into_pipeline(pipeline: Any, file: str | Path, *, strength: float = 1.0) -> None:
    """Attach a LoRA in diffusers' format through diffusers' own loader, and see that all of it arrived.

    Raises:
        AdapterError: The file cannot be loaded, or has layers that the pipeline has not; nothing is attached.
    """
    file = Path(file)
    wanted = sum(key.endswith(".lora_A.weight") for key in adapter_file.read(file).tensors)
    denoiser: nn.Module = vars(pipeline)[_denoiser_name(pipeline)]
    try:  # from the file itself: diffusers reads rank and alpha from its header
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=PEFT_NAME)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{file}: diffusers cannot load it: {reason}") from error
    found = sum(isinstance(module, LoraLayer) for module in denoiser.modules())
    if found != wanted:
        pipeline.unload_lora_weights()
        raise AdapterError(
            f"{file}: {found} of its {wanted} layers are in this {type(denoiser).__name__}. It is for "
            "another model family, or adapts text encoders too."
        )
    pipeline.set_adapters(PEFT_NAME, strength)


def remove_from_pipeline(pipeline: Any, adapter: LycorisAdapter) -> None:
    """Take an adapter off: the denoiser is bit-identical to what it was before, other adapters stay."""
    adapter.detach()
    if isinstance(pipeline, MaskedDenoising):
        denoiser: nn.Module = vars(pipeline)[pipeline.denoiser_name]
        layers = (module for module in denoiser.modules() if isinstance(module, TLoraLayer))
        schedule = next((layer.schedule for layer in layers if layer.schedule is not None), None)
        pipeline._tlora_config = None if schedule is None else schedule.config()


def masked(pipeline: Any) -> Any:
    """The same pipeline, opening from now on the ranks of each step once `_tlora_config` is set on it.

    It stays an instance of its own class, under the same name. Pipelines made from it (`from_pipe`) are stock
    ones again and share its denoiser; give each of them to this function too.

    Raises:
        AdapterError: The pipeline has no denoiser that is known.
    """
    if not isinstance(pipeline, MaskedDenoising):
        pipeline_class, names = type(pipeline), {"denoiser_name": _denoiser_name(pipeline)}
        # Under the same name, which diffusers writes to model_index.json and looks up when loading.
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
            f"{type(pipeline).__name__} has no {' or '.join(DENOISER_NAMES)} to attach an adapter to. Give a "
            "diffusers pipeline that is loaded, or attach the file to a model with load_adapter."
        )
    return found[0]
