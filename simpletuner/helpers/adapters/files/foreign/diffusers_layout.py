"""A standard LoRA of another program in diffusers' layout, in which PEFT reads it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile, layer_name
from simpletuner.helpers.adapters.files.foreign.translation import translate
from simpletuner.helpers.adapters.files.scales import scale_of
from simpletuner.helpers.errors import AdapterError

_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


def in_diffusers_layout(file: AdapterFile, denoiser: nn.Module, *, prefix: str) -> AdapterFile:
    """The file with diffusers' keys, each alpha folded into B; unchanged if it has them and a header already.

    Args:
        file: A LoRA, also with DoRA's magnitudes.
        denoiser: The model whose layers it adapts.
        prefix: Name of the denoiser in diffusers' keys.

    Raises:
        AdapterError: A layer is not in the denoiser, or no standard LoRA.
    """
    if METADATA_KEY in file.metadata and all(key.startswith(f"{prefix}.") for key in file.tensors):
        return file
    translated = translate(file, denoiser)
    own_names = {layer_name(path): path for path, _ in denoiser.named_modules()}
    tensors, layers = {}, translated.file.layers
    for key, tensor in translated.file.tensors.items():
        name, _, part = key.partition(".")
        path = own_names.get(name)
        if path is None or part not in (*_NAMES, "alpha", "dora_scale"):
            what = "in the denoiser" if path is None else "of a standard LoRA"
            raise AdapterError(f"{file.path}: {key} is not {what}.")
        if part == "lora_up.weight":
            tensor = tensor.float() * scale_of(layers[name])
        if part == "dora_scale":
            tensors[f"{prefix}.{path}.lora_magnitude_vector"] = tensor.flatten()
        elif part != "alpha":
            tensors[f"{prefix}.{path}.{_NAMES[part]}"] = tensor
    metadata = {key: value for key, value in file.metadata.items() if key != METADATA_KEY}
    return replace(file, tensors=tensors, metadata=metadata)
