"""Layers of text encoders in adapter files: their keys, and what they are for one text encoder.

Source of the names: diffusers' LoRA loaders (text_encoder., text_encoder_2.), and kohya's scripts and
ComfyUI (lora_te1_, lora_te2_).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor, nn

from simpletuner.helpers.adapters.files.adapter_file import METADATA_KEY, AdapterFile
from simpletuner.helpers.adapters.files.foreign.alphas import complete_alphas, config_of
from simpletuner.helpers.adapters.files.foreign.keys import split_keys
from simpletuner.helpers.adapters.files.scales import scale_of
from simpletuner.helpers.adapters.tlora.stored_layer import VANILLA_KEYS
from simpletuner.helpers.errors import AdapterError

KOHYA_PREFIXES = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""Name of a text encoder in diffusers -> first part of its keys in files of kohya's layout."""
OUTER = "text_model"
"""Module that encloses a CLIP text encoder in files; in some versions of transformers no model has it."""
_LAYER = re.compile(rf"{OUTER}_encoder_layers_(?P<number>\d+)_(?P<block>self_attn|mlp)_(?P<layer>\w+)")
_READ = ("CLIPTextModel", "CLIPTextModelWithProjection")
"""Classes of text encoders whose layers are read."""


@dataclass(frozen=True, slots=True)
class TextLayer:
    """A standard LoRA layer of a text encoder, at scale alpha / rank 1."""

    encoder: str
    """A key of KOHYA_PREFIXES."""
    path: str
    """Path of the layer in files of diffusers' layout, below the encoder."""
    down: Tensor
    """[R, I]."""
    up: Tensor
    """[O, R]."""

    def in_diffusers_layout(self) -> dict[str, Tensor]:
        """Its tensors as diffusers and PEFT name them."""
        name = f"{self.encoder}.{self.path}"
        return {f"{name}.lora_A.weight": self.down, f"{name}.lora_B.weight": self.up}

    def in_kohya_layout(self) -> dict[str, Tensor]:
        """Its tensors as kohya's scripts and ComfyUI name them."""
        name = f"{KOHYA_PREFIXES[self.encoder]}_{self.path}".replace(".", "_")
        alpha = self.down.new_tensor(float(self.down.shape[0]))
        parts = {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": alpha}
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def path_in_files(path: str) -> str:
    """Path of a text encoder's layer in files, by that in the model."""
    return path if path.startswith(f"{OUTER}.") else f"{OUTER}.{path}"


def is_read(encoder: object) -> bool:
    """Whether a component of a pipeline is a text encoder whose layers are read."""
    return isinstance(encoder, nn.Module) and type(encoder).__name__ in _READ


def encoders_in(file: AdapterFile) -> list[str]:
    """Names of the text encoders that a file has layers of."""
    return [name for name in KOHYA_PREFIXES if any(_rest(key, name) is not None for key in file.tensors)]


def layer_counts(file: AdapterFile) -> dict[str, int]:
    """Number of the layers that a file has of each text encoder that it has any of."""
    return {name: len(split_keys(_part(file, name, has_outer=True)).layers) for name in encoders_in(file)}


def without_encoders(file: AdapterFile, names: Collection[str]) -> AdapterFile:
    """The file without the layers of these text encoders."""
    kept = {
        key: tensor
        for key, tensor in file.tensors.items()
        if not any(_rest(key, name) is not None for name in names)
    }
    return replace(file, tensors=kept)


def file_of_encoder(file: AdapterFile, name: str, encoder: nn.Module) -> AdapterFile:
    """The layers of one text encoder, as the file of an adapter of that model.

    Args:
        file: An adapter file with layers of this encoder.
        name: A key of KOHYA_PREFIXES.
        encoder: The model, for the names of its layers.
    """
    return _part(file, name, has_outer=OUTER in dict(encoder.named_children()))


def text_layers(file: AdapterFile, name: str) -> list[TextLayer]:
    """The layers that a file has of one text encoder.

    Raises:
        AdapterError: A layer is no standard LoRA, or no layer of CLIP.
    """
    part = _part(file, name, has_outer=True)
    layers = []
    for layer, parts in complete_alphas(part, split_keys(part)).items():
        place = _LAYER.fullmatch(layer.replace(".", "_"))
        if place is None or set(parts) - {"alpha", "dtype_tensor"} != set(VANILLA_KEYS):
            found = ", ".join(sorted(parts))
            raise AdapterError(
                f"{file.path}: {name} {layer} with {found} is no standard LoRA of a CLIP text encoder. Use "
                "the file itself."
            )
        path = f"{OUTER}.encoder.layers.{place['number']}.{place['block']}.{place['layer']}"
        down, up = (parts[key] for key in VANILLA_KEYS)
        layers.append(TextLayer(encoder=name, path=path, down=down, up=up.float() * scale_of(parts)))
    return layers


def _part(file: AdapterFile, name: str, *, has_outer: bool) -> AdapterFile:
    """The tensors of one text encoder, with or without the enclosing module in their keys."""
    tensors = {}
    for key, tensor in file.tensors.items():
        rest = _rest(key, name)
        if rest is not None:
            bare = rest.removeprefix(f"{OUTER}.").removeprefix(f"{OUTER}_")
            separator = rest[len(OUTER)] if bare != rest else "."
            tensors[f"{OUTER}{separator}{bare}" if has_outer else bare] = tensor
    config = config_of({name}, file.entry(METADATA_KEY) or {})
    # Under the name that a model's configuration has in a header of one adapter.
    header = {METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in config.items()})}
    return AdapterFile(path=file.path, tensors=tensors, metadata=header if config else {})


def _rest(key: str, name: str) -> str | None:
    """The key of a text encoder's tensor without the encoder's name; None for another tensor."""
    prefixes = (f"{name}.", f"{KOHYA_PREFIXES[name]}_", f"{KOHYA_PREFIXES[name]}.")
    prefix = next((each for each in prefixes if key.startswith(each)), None)
    return None if prefix is None else key.removeprefix(prefix)
