"""Keys of adapter files: which part of a layer a tensor is, under the names of many programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from simpletuner.helpers.adapters.files.adapter_file import LAYER_PREFIX, AdapterFile
from simpletuner.helpers.adapters.tlora.stored_layer import BASE_KEYS, KEYS, TRAINED_KEYS, VANILLA_KEYS
from simpletuner.helpers.errors import AdapterError

TLORA_PREFIX = "tlora_"
WRAPPERS = ("base_model.model.", "model.diffusion_model.")
PREFIXES = ("diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_", TLORA_PREFIX)
"""What stands before a denoiser's layer; LAYER_PREFIX is LyCORIS's and this program's."""
TEXT_ENCODERS = ("lora_te", "lora_text_encoder", "text_encoder", "te1", "te2", "clip_l.", "clip_g.", "t5.")
EMBEDDINGS = ("bundle_emb.",)
_OF_TEXT_ENCODERS = "layers of text encoders"
STATIC_KEYS = ("tlora_current_rank", "tlora_min_rank", "tlora_max_rank", "tlora_alpha")

# diffusers once kept LoRA layers in the attention processors: "<attention>.processor.to_q_lora.<part>".
PROCESSOR = re.compile(r"(?P<attention>.+)\.processor\.(?P<layer>\w+)_lora\.(?P<part>.+)")
# Layer of a processor -> path below the attention, where they differ. Source: diffusers' attention classes.
IN_ATTENTION = {
    "to_out": "to_out.0",
    "to_q_proj": "add_q_proj",
    "to_k_proj": "add_k_proj",
    "to_v_proj": "add_v_proj",
    "to_out_proj": "to_add_out",
}
_PARTS = (
    *KEYS,
    *("lora_mid.weight", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "on_input", "weight"),
    *("oft_blocks", "oft_diag", "rescale", *(f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm"))),
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    *STATIC_KEYS,
)
# A PEFT adapter's name may stand within its keys.
_SPELLINGS = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora_B(\.\w+)?\.weight"), "lora_up.weight"),
    (re.compile(r"\.lora(_linear_layer)?\.down\.weight"), "lora_down.weight"),
    (re.compile(r"\.lora(_linear_layer)?\.up\.weight"), "lora_up.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.\w+)*"), "dora_scale"),
    (re.compile(r"\.base_q\.weight"), "base_q"),
    (re.compile(r"\.base_p\.weight"), "base_p"),
    (re.compile(r"\.base_lambda_buf"), "base_lambda"),
    *((re.compile(re.escape(f".{part}")), part) for part in _PARTS),
)
_IN_PROCESSOR = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
_LAMBDAS = ("lambda_layer", "base_lambda")
# Part of a key -> the program whose files cannot be given a meaning here, and why.
REFUSED = {
    ".lora_time_gamma": "DiffSynth's time-aware LoRA scales its ranks by trained functions of the timestep",
    ".oft_R.": "OneTrainer's OFT has another parametrisation",
    ".vera_lambda": "VeRA's random factors are not in the file",
}


@dataclass(frozen=True, slots=True)
class ForeignLayers:
    """The tensors of a file by layer and part."""

    layers: Mapping[str, dict[str, Tensor]]
    """Layer name without prefix, as in the file -> part in LyCORIS's layout -> tensor."""
    prefixes: frozenset[str]
    """Prefixes of the denoiser's keys; "" for none."""
    in_processors: bool
    """Whether the layers stand in attention processors, as in the T-LoRA authors' release."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Key -> reason for which it is not read."""

    @property
    def is_own(self) -> bool:
        """Whether every key has LyCORIS's prefix, so that names need no translation."""
        return self.prefixes == {LAYER_PREFIX}

    def has(self, part: str) -> bool:
        """Whether a layer has this part."""
        return any(part in layer for layer in self.layers.values())


def split_keys(file: AdapterFile) -> ForeignLayers:
    """Sort the tensors of a file by layer and part.

    Raises:
        AdapterError: A key is unknown, or two keys mean one tensor.
    """
    _refuse_meaningless(file)
    layers: dict[str, dict[str, Tensor]] = {}
    first_keys: dict[str, str] = {}
    prefixes, left_out, processors = set(), {}, set()
    for key, tensor in file.tensors.items():
        bare = _without(key, WRAPPERS)
        reason = _reason_to_leave_out(bare)
        if reason is not None:
            left_out[key] = reason
            continue
        prefix = next((each for each in (LAYER_PREFIX, *PREFIXES) if bare.startswith(each)), "")
        layer, part = _layer_and_part(bare.removeprefix(prefix), file.tensors, key=key, file=file)
        parts = layers.setdefault(layer, {})
        first_keys.setdefault(layer, key)
        if part in parts:
            raise AdapterError(f"{file.path}: {key}: the file has this tensor twice, under two keys.")
        if part in _LAMBDAS and tensor.ndim == 1:
            tensor = tensor[None]
        # PEFT's magnitude is [O], of a convolution [1, O, 1, 1]; LyCORIS's first axis is the output.
        parts[part] = tensor.flatten() if "lora_magnitude_vector" in key else tensor
        prefixes.add(prefix)
        processors.add(PROCESSOR.fullmatch(bare) is not None)
    for layer, parts in layers.items():
        _refuse_incomplete(file.path, first_keys[layer], parts)
    if not layers:
        only = next(iter(left_out.values()), _OF_TEXT_ENCODERS)
        raise AdapterError(f"{file.path}: it has no layer of a denoiser, only {only}.")
    return ForeignLayers(layers, frozenset(prefixes), any(processors), left_out)


def _refuse_incomplete(path: Path, key: str, parts: Mapping[str, Tensor]) -> None:
    if not set(parts) - {"alpha", "dora_scale", "tlora_schedule"}:
        raise AdapterError(f"{path}: {key}: the file has no factor of this layer.")
    if {TRAINED_KEYS[0], VANILLA_KEYS[0]} <= set(parts):
        raise AdapterError(f"{path}: {key}: its layer has {VANILLA_KEYS[0]} and {TRAINED_KEYS[0]}.")


def _without(key: str, prefixes: Iterable[str]) -> str:
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    return key


def _reason_to_leave_out(key: str) -> str | None:
    if key.startswith(EMBEDDINGS):
        return "embeddings of prompt words"
    return _OF_TEXT_ENCODERS if key.startswith(TEXT_ENCODERS) else None


def _layer_and_part(
    bare: str, tensors: Mapping[str, Tensor], *, key: str, file: AdapterFile
) -> tuple[str, str]:
    if match := PROCESSOR.fullmatch(bare):
        within, part = match["part"], _IN_PROCESSOR.get(match["part"], match["part"])
        layer = f"{match['attention']}.{IN_ATTENTION.get(match['layer'], match['layer'])}"
        for spelling, name in _SPELLINGS:
            if spelling.fullmatch(f".{part}") and name in (*TRAINED_KEYS, *BASE_KEYS, *VANILLA_KEYS):
                return layer, name
        raise AdapterError(f"{file.path}: {key}: {within} is no factor of an attention processor's layer.")
    for spelling, name in _SPELLINGS:
        for match in spelling.finditer(bare):
            layer = bare[: match.start()]
            if match.end() == len(bare) and (name != "weight" or _is_ia3(key, tensors)):
                return layer, name
    if key.startswith(LAYER_PREFIX):  # LyCORIS's names have no dots, so any part can be told
        layer, _, part = bare.partition(".")
        return layer, part
    raise AdapterError(f"{file.path}: {key} is no tensor of a known adapter format.")


def _is_ia3(key: str, tensors: Mapping[str, Tensor]) -> bool:
    return f"{key.removesuffix('.weight')}.on_input" in tensors


def _refuse_meaningless(file: AdapterFile) -> None:
    for key in file.tensors:
        for part, reason in REFUSED.items():
            if part in f"{key}.":
                raise AdapterError(f"{file.path}: {reason}; nothing here computes it ({key}).")
        if key.endswith(".down.weight") and not re.search(r"_lora\d?\.|\.lora\.|\.lora_linear_layer\.", key):
            raise AdapterError(
                f"{file.path}: {key} is from a trainer whose rank mask is inverted (most ranks at the "
                "highest noise), without alpha and schedule; no schedule here reproduces it."
            )
