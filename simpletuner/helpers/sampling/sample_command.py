"""`simpletuner sample`: images from an adapter file or a whole model, with the base model of its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.embeddings import is_embeddings
from simpletuner.helpers.adapters.files.text_layers import without_encoders
from simpletuner.helpers.adapters.inference import (
    attach_to_encoders,
    attach_to_pipeline,
    is_read_by_diffusers,
    load_peft_into_pipeline,
)
from simpletuner.helpers.adapters.new_tokens import attach_embeddings
from simpletuner.helpers.configuration.loading import rules
from simpletuner.helpers.configuration.loading.building import S, Source, Validated, build
from simpletuner.helpers.configuration.schema.base import PathContext
from simpletuner.helpers.configuration.schema.model import ModelConfig
from simpletuner.helpers.configuration.schema.model_source import FILE_SUFFIX
from simpletuner.helpers.configuration.schema.noise import NoiseConfig
from simpletuner.helpers.configuration.schema.sections import (
    PrecisionConfig,
    ValidationConfig,
    ValidationPrompt,
)
from simpletuner.helpers.configuration.text.problems import Problems, nearest
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.errors import ConfigError, ModelError
from simpletuner.helpers.io.new_files import unused
from simpletuner.helpers.io.redaction import PLACEHOLDER
from simpletuner.helpers.io.safetensors_file import read_metadata
from simpletuner.helpers.models.denoiser_weights import find_denoiser
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.models.quantisation import quantize_and_move
from simpletuner.helpers.models.registry import load_family
from simpletuner.helpers.sampling.embeddings import read_embeddings, text_parts
from simpletuner.helpers.sampling.images import save_png
from simpletuner.helpers.sampling.prompts import expand_prompts, pipeline_inputs, pipeline_type
from simpletuner.helpers.sampling.references import with_references

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMMAND = "sample"
MODEL_KEY = "pretrained_model_name_or_path"
HEADER_KEYS = {
    "model_family": "model_family",
    "model_flavour": "model_flavour",
    "base_model": MODEL_KEY,
    "prediction_type": "prediction_type",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "max_token_length": "max_token_length",
    **{key: key for key in ModelConfig.model_fields if key.startswith("pretrained_") and key != MODEL_KEY},
}
"""Header field of an adapter file -> key of the model section."""
NOISE_KEYS = tuple(NoiseConfig.model_fields)
PRECISION_KEYS = tuple(key for key in PrecisionConfig.model_fields if "model" in key or "text_encoder" in key)
"""Keys of the noise and the precision section that a header may hold."""


@dataclass(frozen=True, kw_only=True)
class _Sections:
    """The configuration sections that sampling needs."""

    model: ModelConfig
    noise: NoiseConfig
    precision: PrecisionConfig
    validation: ValidationConfig


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The arguments of `simpletuner sample`."""

    adapter: Path
    """The file; or the folder of a whole denoiser in diffusers' layout."""
    prompts: Sequence[str]
    model: Mapping[str, object]
    """Keys of the model section; they override the file's header."""
    validation: Mapping[str, object]
    """Keys of the validation section."""
    dtype: str | None
    """Key of DTYPES; None is bf16 on a GPU and fp32 elsewhere."""
    precision: Mapping[str, object] = field(default_factory=dict)
    """Keys of the precision section; they override the file's header."""
    embeddings: Sequence[str] = ()
    """Files of new tokens beside the adapter's own, each as FILE or FILE=TOKEN."""
    schedule: Mapping[str, int | float | str] = field(default_factory=dict)
    """Values of the rank schedule; they override the file's."""
    options: Mapping[str, str]
    """Key of a section -> its command-line option, for messages."""


def sample(request: SampleRequest, *, output: Path, families: Mapping[str, ModelSpec]) -> Iterator[Path]:
    """Generate the images and write each as PNG; a name that exists gets a number.

    Yields:
        The path of each written file, in the order of prompts, sizes and seeds.

    Raises:
        ConfigError: The base model is unknown, or values are invalid; it lists every problem.
        AdapterError: The file is unreadable or does not fit the model.
        ModelError: The model is missing or does not load.
    """
    # Before the model: a damaged file fails at once.
    stored = None if request.adapter.is_dir() else adapter_file.read(request.adapter, takes_embeddings=True)
    if stored is None:
        request, header = _of_whole_model(request)
    else:
        header = stored.metadata
    is_alone = stored is not None and is_embeddings(stored)  # a token that was trained alone
    tokens = read_embeddings(request.adapter, header, is_alone=is_alone, given=request.embeddings)
    stored = None if is_alone else stored
    sections = sections_of(request, header=header, families=families)
    family, validation = make_family(sections, dtype=request.dtype), sections.validation
    prompts = with_references(
        expand_prompts(validation, seed=0), alignment=family.spec.pixel_alignment, fills_image=False
    )
    negative = validation.validation_negative_prompt
    texts = sorted({negative, *(prompt.text for prompt in prompts)})
    family.load_text_encoders()
    strength = validation.validation_lycoris_strength
    if stored is not None:
        attach_to_encoders(stored, family.text_encoders, strength=strength)
    for each in tokens:
        attach_embeddings(text_parts(family), each, strength=strength)
    embeds = dict(zip(texts, family.encode_prompts(texts), strict=True))
    applied = list(family.text_encoders)
    family.unload_text_encoders()
    precision = sections.precision.base_model_precision
    denoiser = quantize_and_move(family.load_denoiser(), precision=precision, device=family.device).eval()
    pipeline: Any = family.make_pipeline(
        denoiser, pipeline_type(prompts), scheduler=validation.validation_noise_scheduler
    )
    if stored is not None:
        _load_adapter(pipeline, stored, request, applied=applied, strength=strength)
    del stored
    for prompt in prompts:
        inputs = pipeline_inputs(
            family, prompt, texts=(embeds[prompt.text], embeds[negative]), config=validation
        )
        image = pipeline(**inputs).images[0]
        file = unused(output / f"{prompt.name}.png")
        save_png(image, file)
        yield file


def _load_adapter(
    pipeline: Any,
    stored: adapter_file.AdapterFile,
    request: SampleRequest,
    *,
    applied: Sequence[str],
    strength: float,
) -> None:
    """Attach the adapter's layers of the denoiser; `applied` names the text encoders that have theirs."""
    if is_read_by_diffusers(stored) and not request.schedule:
        load_peft_into_pipeline(pipeline, request.adapter, strength=strength)
    else:
        rest = without_encoders(stored, applied)
        attach_to_pipeline(pipeline, rest, strength=strength, schedule=request.schedule)


def _of_whole_model(request: SampleRequest) -> tuple[SampleRequest, Mapping[str, str]]:
    """The request with the folder as the model's denoiser, and the header of its weights.

    Raises:
        ConfigError: A strength or a rank schedule is given.
        ModelError: It is no denoiser of a known family.
    """
    folder = request.adapter
    if request.schedule or request.validation.get("validation_lycoris_strength", 1.0) != 1.0:
        raise ConfigError(f"{folder} is a whole model, which has no strength and no rank schedule.")
    found = find_denoiser(str(folder), option="ADAPTER")
    weights = sorted(folder.glob(f"*{FILE_SUFFIX}"))
    denoiser = {f"pretrained_{found.spec.denoiser_name}_model_name_or_path": str(folder)}
    model = {"model_family": found.family, **denoiser, **request.model}
    return replace(request, model=model), read_metadata(weights[0], error=ModelError)


def sections_of(
    request: SampleRequest, *, header: Mapping[str, str], families: Mapping[str, ModelSpec]
) -> _Sections:
    """The configuration sections for an adapter file: its header's values under the request's.

    Raises:
        ConfigError: The base model is unknown, or values are invalid; it lists every problem.
    """
    values: dict[str, object] = {key: header[name] for name, key in HEADER_KEYS.items() if name in header}
    if MODEL_KEY in request.model:  # the components that the run swapped belong to the header's model
        values = {key: value for key, value in values.items() if not key.startswith("pretrained_")}
    values |= request.model
    hidden = [str(value) for value in values.values() if PLACEHOLDER.search(str(value))]
    if hidden:
        raise ConfigError(
            f"{request.adapter}: its header names the model by an environment variable of the training run: "
            f"{', '.join(hidden)}. Give {request.options[MODEL_KEY]}."
        )
    spec = _spec(values, request, families=families)
    problems = _OptionProblems(request.options)
    given = {*request.model, *request.validation, *request.precision}
    source = Source(problems, lambda key: COMMAND if key in given else str(request.adapter), PathContext())
    defaults = {
        "validation_resolution": spec.default_resolution,
        "validation_guidance": spec.default_guidance,
    }
    model = build(ModelConfig, values, source)
    # The noise settings of training: the shift of the noise levels is among them.
    noise = build(NoiseConfig, {key: header[key] for key in NOISE_KEYS if key in header}, source)
    stored = {key: header[key] for key in PRECISION_KEYS if key in header}
    precision = build(PrecisionConfig, stored | dict(request.precision), source)
    validation = build(ValidationConfig, defaults | dict(request.validation), source)
    rules.check_family((model, noise, validation), spec, families=families, source=source)
    rules.check_validation(validation, spec, source)
    images = () if validation.section is None else validation.section.validation_reference_images
    prompts = tuple(ValidationPrompt(name=text, text=text, images=images) for text in request.prompts)
    if images and not spec.reference_flavours:
        source.add("validation_reference_images", f"{spec.name} takes no reference images. Remove it.")
    problems.raise_if_any()
    return _Sections(
        model=_valid(model),
        noise=_valid(noise),
        precision=_valid(precision),
        validation=_valid(validation).model_copy(update={"prompts": prompts}),
    )


def _spec(
    values: Mapping[str, object], request: SampleRequest, *, families: Mapping[str, ModelSpec]
) -> ModelSpec:
    missing = [request.options[key] for key in ("model_family", MODEL_KEY) if key not in values]
    if missing:
        raise ConfigError(
            f"{request.adapter}: its header does not name the model. Give {' and '.join(missing)}."
        )
    spec = families.get(str(values["model_family"]))
    if spec is None:
        name, option = str(values["model_family"]), request.options["model_family"]
        known = f"Known families: {', '.join(sorted(families))}.{nearest(name, families)}"
        if "model_family" in request.model:
            raise ConfigError(f"{option} {name}: not a model family here. {known}")
        raise ConfigError(f"{request.adapter} is for the family {name}. {known} Give another with {option}.")
    return spec


class _OptionProblems(Problems):
    """Problems of keys, told with the options of the command line that set them."""

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__()
        self._options = options

    def add(self, source: str, key: str, text: str) -> None:
        """Note a problem; a problem of the adapter's header keeps the name of its key."""
        is_option = source == COMMAND
        super().add(source, self._as_options(key) if is_option else key, self._as_options(text))

    def _as_options(self, text: str) -> str:
        for key in sorted(self._options, key=len, reverse=True):
            text = text.replace(key, self._options[key])
        return text


def _valid(validated: Validated[S]) -> S:
    assert validated.section is not None, "raise_if_any lets no invalid section through"
    return validated.section


def make_family(sections: _Sections, *, dtype: str | None) -> ModelFamily:
    """The model family of these sections, on the accelerator if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    default = "bf16" if device.type == "cuda" else "fp32"
    return load_family(sections.model.model_family)(
        FamilyContext(
            model=sections.model,
            noise=sections.noise,
            precision=sections.precision,
            device=device,
            weight_dtype=DTYPES[dtype or default],
        )
    )
