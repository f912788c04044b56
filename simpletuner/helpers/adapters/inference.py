"""Load an adapter file into a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from simpletuner.helpers.adapters.files import adapter_file, embeddings
from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.translation import ScheduleOptions, paths_in
from simpletuner.helpers.adapters.files.text_layers import (
    encoders_in,
    file_of_encoder,
    is_read,
    without_encoders,
)
from simpletuner.helpers.adapters.network import LycorisAdapter, attach_stored
from simpletuner.helpers.adapters.new_tokens import TextPart, attach_embeddings
from simpletuner.helpers.adapters.pipeline import MaskedDenoising
from simpletuner.helpers.adapters.tlora.masked_layer import MaskedLayer
from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.names import one_line_reason

DENOISER_NAMES = ("unet", "transformer")
PEFT_NAME = "default"
COMPILED_CHILD = "_orig_mod"  # torch.compile(denoiser) keeps the denoiser under this name


def load_into_pipeline(
    pipeline: Any, file: str | Path, *, strength: float = 1.0, schedule: ScheduleOptions | None = None
) -> LycorisAdapter:
    """Attach the adapter of a file of any known program to a pipeline, with the file's rank schedule.

    Layers of CLIP text encoders are attached to the pipeline's, if it has them. `masked` adds the rank mask
    to a pipeline that is not bundled. The returned adapter's `set_strength` scales it, `remove_from_pipeline`
    removes it.

    Args:
        pipeline: A loaded diffusers pipeline.
        file: The file; documentation/adapter-files.md lists what is read.
        strength: Scale of the adapter's contribution.
        schedule: Any of min_rank, alpha, kind and scale, in place of the file's own, such as
            {"min_rank": 8, "alpha": 1.0}.

    Raises:
        AdapterError: The pipeline has no known denoiser, or the file cannot be read or does not fit; nothing
            is attached.
    """
    stored = adapter_file.read(Path(file))
    return attach_to_pipeline(pipeline, stored, strength=strength, schedule=schedule)


def attach_to_pipeline(
    pipeline: Any, stored: AdapterFile, *, strength: float = 1.0, schedule: ScheduleOptions | None = None
) -> LycorisAdapter:
    """As `load_into_pipeline`, for the content of a file.

    Raises:
        AdapterError: As for `load_into_pipeline`.
    """
    denoiser = _denoiser(pipeline)
    found = {name: pipeline.components.get(name) for name in encoders_in(stored)}
    encoders = {name: encoder for name, encoder in found.items() if is_read(encoder)}
    in_text = attach_to_encoders(stored, encoders, strength=strength)
    try:
        rest = without_encoders(stored, encoders)
        adapter = attach_stored(denoiser, rest, strength=strength, schedule=schedule)
    except AdapterError:
        for each in in_text.values():
            each.detach()
        raise
    adapter.join([*in_text.values()])
    if adapter.tlora_config is not None:
        masked(pipeline)._tlora_config = adapter.tlora_config
    return adapter


def attach_to_encoders(
    stored: AdapterFile, encoders: Mapping[str, Any], *, strength: float = 1.0
) -> dict[str, LycorisAdapter]:
    """Attach the layers that a file has of these text encoders, by their names in diffusers.

    Returns:
        The adapter of each text encoder that the file has layers of.

    Raises:
        AdapterError: A layer does not fit its text encoder; nothing is attached.
    """
    attached: dict[str, LycorisAdapter] = {}
    for name in encoders_in(stored):
        if name not in encoders:
            continue
        try:
            own = file_of_encoder(stored, name, encoders[name])
            attached[name] = attach_stored(encoders[name], own, strength=strength)
        except AdapterError:
            for each in attached.values():
                each.detach()
            raise
    return attached


def load_embeddings_into_pipeline(
    pipeline: Any, file: str | Path, *, token: str | None = None, strength: float = 1.0
) -> None:
    """Add the new token of a file (textual inversion) to a pipeline's text encoders and tokenizers.

    Args:
        pipeline: A loaded diffusers pipeline.
        file: A safetensors file of this program, kohya's scripts or diffusers' scripts.
        token: The word in prompts; None for that of the file.
        strength: 1 as trained; 0 the embeddings that the token started from, where the file names them.

    Raises:
        AdapterError: The file cannot be read, is for another model, or the pipeline knows the token.
    """
    components = pipeline.components
    parts = {
        name: TextPart(components[name], components[name.replace("text_encoder", "tokenizer")])
        for name in embeddings.KEYS
        if is_read(components.get(name))
    }
    attach_embeddings(parts, embeddings.read(Path(file), token=token), strength=strength)


def is_read_by_diffusers(file: AdapterFile) -> bool:
    """Whether diffusers' loader reads a file right: a LoRA of its own layout for a denoiser alone."""
    prefixes = tuple(f"{name}." for name in DENOISER_NAMES)
    in_layout = all(key.startswith(prefixes) and ".lora_" in key for key in file.tensors)
    return METADATA_KEY in file.metadata and in_layout and file.is_peft


def load_peft_into_pipeline(pipeline: Any, file: str | Path, *, strength: float = 1.0) -> str:
    """Attach a LoRA with diffusers' loader, and check that every layer of the file was loaded.

    Adapters that are loaded already stay, active and at their strength.

    Returns:
        Name of the adapter in the pipeline.

    Raises:
        AdapterError: The file cannot be loaded, or has layers that are not in the pipeline; nothing is
            attached.
    """
    file = Path(file)
    denoiser = _denoiser(pipeline)
    wanted = paths_in(adapter_file.read(file), denoiser)
    taken = {name for names in pipeline.get_list_adapters().values() for name in names}
    active = pipeline.get_active_adapters() if taken else []
    free = (f"{PEFT_NAME}_{number}" for number in count(2))
    name = PEFT_NAME if PEFT_NAME not in taken else next(each for each in free if each not in taken)
    try:  # from the file itself: diffusers reads rank and alpha from its header
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    except (ValueError, RuntimeError, LookupError, AssertionError, TypeError, AttributeError) as error:
        _activate(pipeline, active)
        reason = one_line_reason(error) or type(error).__name__
        raise AdapterError(
            f"{file}: diffusers cannot load it: {reason}. Load it with load_into_pipeline, which reads more "
            "layouts."
        ) from error
    layers = dict(denoiser.named_modules())
    found = {path for path in wanted if _is_lora(layers[path], name)}
    if len(found) < len(wanted):
        pipeline.delete_adapters(name)
        _activate(pipeline, active)
        raise AdapterError(
            f"{file}: diffusers loads only {len(found)} of its {len(wanted)} layers into this "
            f"{type(denoiser).__name__}. Load it with load_into_pipeline, which reads more layouts."
        )
    _activate(pipeline, [*active, name])
    for layer in _lora_layers(pipeline):
        if name in layer.scaling:
            layer.set_scale(name, strength)
    return name


def _activate(pipeline: Any, names: Sequence[str]) -> None:
    """Make these adapters active in every LoRA layer; diffusers leaves the last one alone active."""
    for layer in _lora_layers(pipeline):
        layer.set_adapter(list(names), inference_mode=True)


def _lora_layers(pipeline: Any) -> Iterator[LoraLayer]:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            yield from (module for module in component.modules() if isinstance(module, LoraLayer))


def _is_lora(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, LoraLayer) and name in layer.scaling


def remove_from_pipeline(pipeline: Any, adapter: LycorisAdapter) -> None:
    """Remove an adapter: the denoiser becomes bit-identical to before, other adapters stay."""
    adapter.detach()
    if isinstance(pipeline, MaskedDenoising):
        denoiser: nn.Module = getattr(pipeline, pipeline.denoiser_name)
        layers = (module for module in denoiser.modules() if isinstance(module, MaskedLayer))
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


def _denoiser(pipeline: Any) -> nn.Module:
    denoiser: nn.Module = getattr(pipeline, _denoiser_name(pipeline))
    return dict(denoiser.named_children()).get(COMPILED_CHILD, denoiser)


def _denoiser_name(pipeline: Any) -> str:
    found = [name for name in DENOISER_NAMES if isinstance(vars(pipeline).get(name), nn.Module)]
    if not found:
        raise AdapterError(
            f"{type(pipeline).__name__} has no {' or '.join(DENOISER_NAMES)} to attach an adapter to. Pass a "
            "loaded diffusers pipeline, or attach the file to a model with load_adapter."
        )
    return found[0]
