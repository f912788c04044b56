"""Pictures from an adapter file, outside a run: its base model, its schedule, one prompt after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.inference import load_into_pipeline, load_peft_into_pipeline
from simpletuner.helpers.configuration.loading import rules
from simpletuner.helpers.configuration.loading.building import Source, build
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.schema.model_sections import ModelConfig, NoiseConfig, PrecisionConfig
from simpletuner.helpers.configuration.schema.sections import ValidationConfig, ValidationPrompt
from simpletuner.helpers.configuration.text.problems import Problems
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.models.family import ModelFamily
from simpletuner.helpers.models.quantisation import quantize_and_move
from simpletuner.helpers.models.registry import load_family
from simpletuner.helpers.sampling.images import save_png
from simpletuner.helpers.sampling.prompts import call_options, expand_prompts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_KEY = "pretrained_model_name_or_path"
HEADER_KEYS = {
    "model_family": "model_family",
    "model_flavour": "model_flavour",
    "base_model": MODEL_KEY,
    "prediction_type": "prediction_type",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    **{key: key for key in ModelConfig.model_fields if key.startswith("pretrained_") and key != MODEL_KEY},
}
"""What an adapter's header says about the model -> key of the model section."""


FORMATS = tuple(key for key in PrecisionConfig.model_fields if "model" in key or "text_encoder" in key)
"""Keys that say in which format weights are held."""


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """What making pictures needs of the configuration."""

    model: ModelConfig
    noise: NoiseConfig
    precision: PrecisionConfig
    pictures: ValidationConfig


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What `simpletuner sample` was asked for."""

    adapter: Path
    prompts: Sequence[str]
    model: Mapping[str, object]
    """Keys of the configuration's model section that win over what the file says."""
    pictures: Mapping[str, object]
    """Keys of the configuration's validation section."""
    dtype: str | None
    """Key of DTYPES; None is bf16 on a GPU and fp32 elsewhere."""
    precision: Mapping[str, object] = field(default_factory=dict)
    """Keys of the configuration's precision section that win over what the file says."""
    options: Mapping[str, str]
    """Key of a section -> the option that sets it, for messages."""


def sample(request: SampleRequest, *, output: Path, families: Mapping[str, ModelSpec]) -> Iterator[Path]:
    """Make the pictures and write each as PNG.

    Yields:
        Each file once it is written, in the order of prompts, sizes and seeds.

    Raises:
        ConfigError: The base model is stated nowhere, or a value cannot be used; every problem at once.
        AdapterError: The file cannot be read or does not fit the model.
        ModelError: The model cannot be found or loaded.
    """
    stored = adapter_file.read(request.adapter)  # whole: a damaged file is found before a model is loaded
    sections = _checked(request, header=stored.metadata, families=families)
    family, pictures = _family(sections, dtype=request.dtype), sections.pictures
    shots, negative = expand_prompts(pictures, seed=0), pictures.validation_negative_prompt
    prompts = sorted({negative, *(shot.prompt for shot in shots)})
    family.load_text_encoders()
    embeds = dict(zip(prompts, family.encode_prompts(prompts), strict=True))
    family.unload_text_encoders()
    precision = sections.precision.base_model_precision
    denoiser = quantize_and_move(family.load_denoiser(), precision=precision, device=family.device).eval()
    pipeline: Any = family.make_pipeline(denoiser, scheduler=pictures.validation_noise_scheduler)
    load = load_peft_into_pipeline if stored.is_peft else load_into_pipeline
    del stored
    load(pipeline, request.adapter, strength=pictures.validation_lycoris_strength)
    for shot in shots:
        inputs = family.pipeline_inputs(
            embeds[shot.prompt], embeds[negative], pictures=pictures, size=shot.size
        )
        picture = pipeline(**inputs, **call_options(shot, pictures)).images[0]
        file = output / f"{shot.name}.png"
        save_png(picture, file)
        yield file


def _checked(
    request: SampleRequest, *, header: Mapping[str, str], families: Mapping[str, ModelSpec]
) -> _Sections:
    stated = {key: header[name] for name, key in HEADER_KEYS.items() if name in header}
    if (
        MODEL_KEY in request.model
    ):  # another model than the run's, without the components that the run swapped
        stated = {key: value for key, value in stated.items() if not key.startswith("pretrained_")}
    values = stated | dict(request.model)
    missing = [key for key in ("model_family", MODEL_KEY) if key not in values]
    if missing:
        wanted = " and ".join(request.options[key] for key in missing)
        raise ConfigError(f"{request.adapter} does not say what model it is for. Name it with {wanted}.")
    spec = families.get(str(values["model_family"]))
    if spec is None:
        raise ConfigError(
            f"{request.adapter} is for the family {values['model_family']}. Known families: "
            f"{', '.join(sorted(families))}. Give another with {request.options['model_family']}."
        )
    problems = Problems()
    place = Source(problems, lambda key: request.options.get(key, str(request.adapter)), PathContext())
    defaults = {
        "validation_resolution": spec.default_resolution,
        "validation_guidance": spec.default_guidance,
    }
    model = build(ModelConfig, values, place)
    # As they were when the adapter was trained: the shift of noise levels is among them.
    noise = build(NoiseConfig, {key: header[key] for key in NoiseConfig.model_fields if key in header}, place)
    formats = {key: header[key] for key in FORMATS if key in header}
    precision = build(PrecisionConfig, formats | dict(request.precision), place)
    pictures = build(ValidationConfig, defaults | dict(request.pictures), place)
    rules.check_family((model, noise, pictures), spec, families=families, source=place)
    rules.check_validation(pictures, spec, place)
    problems.raise_if_any()
    assert model.section is not None, "a section that cannot be made has a problem"
    assert noise.section is not None, "a section that cannot be made has a problem"
    assert precision.section is not None, "a section that cannot be made has a problem"
    assert pictures.section is not None, "a section that cannot be made has a problem"
    prompts = tuple(ValidationPrompt(name=prompt, text=prompt) for prompt in request.prompts)
    return _Sections(
        model=model.section,
        noise=noise.section,
        precision=precision.section,
        pictures=pictures.section.model_copy(update={"prompts": prompts}),
    )


def _family(sections: _Sections, *, dtype: str | None) -> ModelFamily:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    default = "bf16" if device.type == "cuda" else "fp32"
    return load_family(sections.model.model_family)(
        sections.model,
        noise=sections.noise,
        precision=sections.precision,
        device=device,
        weight_dtype=DTYPES[dtype or default],
    )
