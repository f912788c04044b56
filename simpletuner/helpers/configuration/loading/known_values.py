"""SimpleTuner's values of supported keys that are not supported here, with advice for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from simpletuner.helpers.choices.captions import CAPTION_SOURCES
from simpletuner.helpers.choices.optimizers import OPTIMIZERS
from simpletuner.helpers.choices.precisions import PRECISIONS
from simpletuner.helpers.choices.registry import Registry
from simpletuner.helpers.choices.samplers import SAMPLERS
from simpletuner.helpers.choices.trackers import TRACKERS

# What stands here resumes as another run, or does what another optimiser does with less.
_OPTIMIZERS: Mapping[str, str] = {
    "adamw": "bnb-adamw bnb-adamw-paged optimum-adamw deepspeed-adamw "
    "optimi-adam optimi-radam optimi-adan optimi-ranger optimi-sgd optimi-lamb bnb-lamb bnb-adagrad "
    "bnb-rmsprop bnb-ademamix",
    "bnb-adamw8bit": "bnb-adagrad8bit bnb-rmsprop8bit bnb-ademamix8bit ranger8bit ao-adamfp8 ao-adamwfp8",
    "lion": "bnb-lion bnb-lion-paged",
    "bnb-lion8bit": "bnb-lion8bit-paged",
    "adafactor": "torch-adafactor",
    "adamw_schedulefree": "adamw_schedulefree+aggressive adamw_schedulefree+no_kahan",
    "muon": "soap dion",
}
_PRECISION_KEYS = (
    "base_model_precision",
    *(f"text_encoder_{number}_precision" for number in range(1, 5)),
)
_PRECISIONS = (
    "int2-quanto fp8uz-quanto int4-torchao int8dq-torchao int8dq-int4-torchao fp8wo-torchao fp8-int4-torchao "
    "fp8-native fp8-transformerengine fp4-bnb fp8-bnb int8-bnb nf4-sdnq uint8-sdnq int16-sdnq uint16-sdnq "
    "fp16-sdnq fp8-sdnq int6-sdnq int5-sdnq uint5-sdnq uint4-sdnq uint3-sdnq uint2-sdnq fp16 bf16 fp32"
)
_REGISTRIES: Mapping[str, Registry[Any]] = {
    "optimizer": OPTIMIZERS,
    "caption_strategy": CAPTION_SOURCES,
    "report_to": TRACKERS,
    "validation_noise_scheduler": SAMPLERS,
    **dict.fromkeys(_PRECISION_KEYS, PRECISIONS),
}


def _use(key: str, *others: str) -> str:
    names = [*_REGISTRIES[key], *others]
    return f"Use {'one of ' if len(names) > 1 else ''}{', '.join(names)}."


def _repository(name: str) -> str:
    return f"Remove it, and set pretrained_model_name_or_path to its repository, {name}."


_VALUE_ADVICE: Mapping[str, tuple[str, str]] = {
    "model_type": ("controlnet ip-adapter", "Use lora, full or embedding."),
    "type": ("webshart memory", "Copy the data to a folder and use local."),
    "dataset_type": (
        "video audio conditioning_image_embeds caption distillation_cache",
        'Remove the entry, or set "disabled": true in it.',
    ),
    "conditioning_type": (
        "controlnet ip-adapter latents",
        "For images that an editing model sees, use reference_strict or reference_loose; conditioning on "
        'others is not supported: remove the entry, or set "disabled": true in it.',
    ),
    "caption_strategy": (
        "webshart",
        f"Write each caption into a text file beside its image. {_use('caption_strategy')}",
    ),
    "crop_style": ("face", "Use center, random or corner."),
    "report_to": ("trackio comet_ml swanlab custom-tracker", _use("report_to", "none")),
    "mixed_precision": ("fp8 fp32", "Use bf16, fp16 or no, which is float32."),
    **dict.fromkeys(_PRECISION_KEYS, (_PRECISIONS, _use("base_model_precision"))),
    "lora_init_type": ("loftq pissa_niter_16 corda eva orthogonal", "Use default, gaussian, olora or pissa."),
    "lora_type": ("singlora", "Use standard or lycoris."),
    "validation_noise_scheduler": (
        "flow_matching flow-match dpm sana karras",
        "Use null, the model's own sampler, or name one that its family has.",
    ),
}
_REPOSITORIES: Mapping[str, str] = json.loads(
    Path(__file__).with_name("translation.json").read_text(encoding="utf-8")
)["repositories"]
UNSUPPORTED_VALUES: Mapping[tuple[str, str], str] = MappingProxyType(
    {("model_flavour", flavour): _repository(name) for flavour, name in _REPOSITORIES.items()}
    | {
        (key, value): advice
        for key, (values, advice) in _VALUE_ADVICE.items()
        for value in values.split()
        if value not in _REGISTRIES.get(key, ())
    }
    | {
        ("optimizer", value): f"Use {name}."
        for name, values in _OPTIMIZERS.items()
        for value in values.split()
    }
)
"""(key, value) -> advice."""
