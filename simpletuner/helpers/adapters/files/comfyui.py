"""What ComfyUI makes of an adapter file, and which file to give it instead.

Source: measured with ComfyUI 0.3.64 and a fork of January 2026, as the relative difference of an adapter's
effect; documentation/adapter-files.md has the table by model family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.helpers.errors import AdapterError
from simpletuner.helpers.io.safetensors_file import read_header

Shapes = Mapping[str, Sequence[int]]
"""Key -> shape of its tensor."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that ComfyUI does not compute as the training did."""

    text: str
    export_helps: bool = False
    """`simpletuner export --format comfyui` writes a file that it computes rightly."""


EMBEDDING_KEYS = ("clip_l", "clip_g")
"""Keys of the embeddings of a new token, for the first and the second text encoder."""
JOINED = "single_transformer_blocks"
"""In a layer's name: of a model whose original checkpoint joins layers."""
SCHEDULE = Limit("this file keeps the rank schedule, which ComfyUI does not read", export_helps=True)
NO_ATTENTION = Limit("of this file it applies no attention layer", export_helps=True)
PEFT_DORA = Limit("it is 59 % off with use_dora")
OUTPUT_DORA = Limit("it is 8 to 110 % off with a DoRA magnitude per output (wd_on_out true)")
TUCKER = Limit("it does not apply LoKr's use_tucker")
IA3 = Limit("it does not read ia3")
RESCALED = Limit("it is 10 to 25 % off with rescaled")
DIAG_OFT = Limit("it is right with diag-oft at strength 1 and without constraint only")
JOINED_BIASES = Limit("it is 8 % off with full, because it does not read the biases of joined layers")


def limit_of(layer: Shapes) -> Limit | None:
    """What ComfyUI does not compute of one layer; None where it is within 1e-4 of the live adapter.

    Args:
        layer: The layer's keys without its name.
    """
    if "lambda_layer" in layer:
        return SCHEDULE
    if any("lora_magnitude_vector" in key for key in layer):
        return PEFT_DORA
    if "dora_scale" in layer and layer["dora_scale"][0] != 1:
        return OUTPUT_DORA
    if "lokr_t2" in layer:
        return TUCKER
    if "on_input" in layer:
        return IA3
    if "rescale" in layer:
        return RESCALED
    return DIAG_OFT if len(layer.get("oft_blocks", ())) == 3 else None  # BOFT's blocks have four axes


def limit_of_file(keys: Shapes) -> Limit | None:
    """The first limit of a file's layers, or of the whole file."""
    layers: dict[str, dict[str, Sequence[int]]] = {}
    for key, shape in keys.items():
        name, _, part = key.partition(".")
        layers.setdefault(name, {})[part] = shape
    first = next((found for layer in layers.values() if (found := limit_of(layer)) is not None), None)
    if first is None and any(key.startswith("unet.") and ".lora_A." in key for key in keys):
        return NO_ATTENTION
    if first is None and any(JOINED in key and key.endswith(".diff_b") for key in keys):
        return JOINED_BIASES
    return first


def advice(keys: Shapes, *, file: Path, exported: Path | None = None) -> str:
    """One line for people: whether ComfyUI reads a file, and which one to use instead.

    Args:
        keys: The file's keys.
        file: The file.
        exported: Its export for ComfyUI, if there is one.
    """
    if set(keys) <= set(EMBEDDING_KEYS):
        return f"reads this file in models/embeddings, as embedding:{file.stem} in a prompt"
    limit = limit_of_file(keys)
    if limit is None:
        if not any(key.endswith(".tlora_schedule") for key in keys):
            return "reads this file"
        kind = "LoKr" if any(".lokr_w" in key for key in keys) else "LoRA"
        return f"reads this file as a plain {kind}, without its rank schedule"
    if exported is not None:
        return f"use {exported}; {limit.text}"
    if limit.export_helps:
        return f"use what `simpletuner export {file} --output FILE --format comfyui` writes; {limit.text}"
    return f"{limit.text}; no other file helps"


def advice_for(file: Path, *, exported: Path | None = None) -> str:
    """`advice` for a file on disk, whose tensors are not read.

    Raises:
        AdapterError: The file cannot be read.
    """
    return advice(read_header(file, error=AdapterError), file=file, exported=exported)
