"""`simpletuner sample`: images from an adapter file or a whole model, with the base model of its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from simpletuner.helpers.adapters.files import adapter_file
from simpletuner.helpers.adapters.files.adapter_file import AdapterFile
from simpletuner.helpers.adapters.files.embeddings import Embeddings, is_embeddings
from simpletuner.helpers.configuration.loading import rules
from simpletuner.helpers.configuration.loading.building import S, Source, Validated, build
from simpletuner.helpers.configuration.loading.prompts import read_prompts
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
from simpletuner.helpers.contracts import ModelSpec, Size
from simpletuner.helpers.errors import ConfigError, ModelError
from simpletuner.helpers.io.names import file_name
from simpletuner.helpers.io.new_files import unused
from simpletuner.helpers.io.redaction import PLACEHOLDER
from simpletuner.helpers.io.run_folder import GRID_FILE
from simpletuner.helpers.io.safetensors_file import read_metadata
from simpletuner.helpers.models.denoiser_weights import find_denoiser
from simpletuner.helpers.models.family import FamilyContext, ModelFamily
from simpletuner.helpers.models.quantisation import quantize_and_move
from simpletuner.helpers.models.registry import load_family
from simpletuner.helpers.sampling.attached import attach_in_text, attached, encode, open_ranks
from simpletuner.helpers.sampling.embeddings import read_embeddings
from simpletuner.helpers.sampling.generating import description, generate, image_progress
from simpletuner.helpers.sampling.images import Row, labelled_grid, save_png
from simpletuner.helpers.sampling.prompts import PromptSpec, expand_prompts, pipeline_type
from simpletuner.helpers.sampling.references import with_references
from simpletuner.helpers.sampling.start_image import StartImage, StartOptions, check_pipeline, read_start

STRENGTH_KEY = "validation_lycoris_strength"
TITLES = {STRENGTH_KEY: "strength {}", "validation_num_inference_steps": "{} steps"}
"""Key of a column of a grid -> its title."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMMAND = "command line"
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
class Sections:
    """The configuration sections that sampling needs."""

    model: ModelConfig
    noise: NoiseConfig
    precision: PrecisionConfig
    validation: ValidationConfig

    def at_size(self, size: Size) -> Sections:
        """The sections for images of another size."""
        validation = self.validation.model_copy(update={"validation_resolution": (size,)})
        return replace(self, validation=validation)


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The arguments of `simpletuner sample`."""

    adapter: Path
    """The file; or the folder of a whole denoiser in diffusers' layout."""
    prompts: Sequence[str]
    prompts_file: Path | None = None
    """Further prompts: a json as for user_prompt_library, or a text with one on each line."""
    model: Mapping[str, object]
    """Keys of the model section; they override the file's header."""
    validation: Mapping[str, object]
    """Keys of the validation section."""
    columns: Sequence[Mapping[str, object]] = ({},)
    """Further keys of it for each column of a grid."""
    seeds: Sequence[int] = ()
    """First seeds of each prompt; empty for validation_seed."""
    start: StartOptions | None = None
    """An image to start from."""
    dtype: str | None
    """Key of DTYPES; None is bf16 on a GPU and fp32 elsewhere."""
    precision: Mapping[str, object] = field(default_factory=dict)
    """Keys of the precision section; they override the file's header."""
    embeddings: Sequence[str] = ()
    """Files of new tokens beside the adapter's own, each as FILE or FILE=TOKEN."""
    schedule: Mapping[str, int | float | str] = field(default_factory=dict)
    """Values of the rank schedule; they override the file's."""
    opens_ranks: bool = False
    """Keep every rank active at every timestep."""
    options: Mapping[str, str]
    """Key of a section -> its command-line option, for messages."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The content of an adapter file, or the header of a whole model."""

    request: SampleRequest
    """With a whole model as the denoiser, and the rank schedule that the images have."""
    header: Mapping[str, str]
    stored: AdapterFile | None
    """None for a whole model and for a token that was trained alone."""
    tokens: Sequence[Embeddings]


def open_adapter(request: SampleRequest) -> Opened:
    """Read the file of a request, before a model is loaded: a damaged one fails at once.

    Raises:
        ConfigError: A strength or a rank schedule is given, and it has none.
        AdapterError: The file is unreadable.
        ModelError: The folder is no denoiser of a known family.
    """
    file = request.adapter
    stored = None if file.is_dir() else adapter_file.read(file, takes_embeddings=True)
    if stored is None:
        request, header = _of_whole_model(request)
    else:
        header = stored.metadata
    is_alone = stored is not None and is_embeddings(stored)  # a token that was trained alone
    tokens = read_embeddings(file, header, is_alone=is_alone, given=request.embeddings)
    stored = None if is_alone else stored
    if request.opens_ranks:
        schedule = None if stored is None else open_ranks(stored)
        if schedule is None:
            raise ConfigError(f"{file} is no T-LoRA and has no rank schedule. Remove --open-ranks.")
        request = replace(request, schedule=schedule)
    return Opened(request=request, header=header, stored=stored, tokens=tokens)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the grid."""

    title: str
    """"" for the only one."""
    validation: ValidationConfig
    prompts: tuple[PromptSpec, ...]
    """The same in each column, but for the strength."""


@dataclass(frozen=True, kw_only=True)
class _Images:
    """The images of a request, before a model is loaded."""

    request: SampleRequest
    family: ModelFamily
    sections: Sections
    columns: Sequence[_Column]
    start: StartImage | None

    @property
    def cells(self) -> list[tuple[_Column, PromptSpec]]:
        """Column and prompt of each image, row by row."""
        rows = zip(*(column.prompts for column in self.columns), strict=True)
        return [cell for row in rows for cell in zip(self.columns, row, strict=True)]

    def make_pipeline(self) -> Any:
        """The pipeline with the denoiser, without an adapter."""
        prompts = (prompt for _, prompt in self.cells)
        kind = pipeline_type(prompts) if self.start is None else self.start.pipeline_type
        scheduler = self.sections.validation.validation_noise_scheduler
        return self.family.make_pipeline(load_denoiser(self.family, self.sections), kind, scheduler=scheduler)

    def description(self, column: _Column, prompt: PromptSpec) -> str:
        """The parameters of an image."""
        request = self.request
        return description(
            prompt,
            column.validation,
            start=self.start,
            model=Path(self.sections.model.pretrained_model_name_or_path).name,
            adapter="/".join(request.adapter.parts[-2:]),
            adapter_strength=f"{prompt.strength:g}",
            rank_schedule=" ".join(f"{key} {value}" for key, value in request.schedule.items()) or None,
        )


def sample(request: SampleRequest, *, output: Path, families: Mapping[str, ModelSpec]) -> Iterator[Path]:
    """Generate the images and write each as PNG; a name that exists gets a number.

    Yields:
        The path of each written file, in the order of prompts, sizes, seeds and columns; the grid of several
        columns last.

    Raises:
        ConfigError: The base model is unknown, or values are invalid; it lists every problem.
        AdapterError: The file is unreadable or does not fit the model.
        DataError: The image to start from cannot be used.
        ModelError: The model is missing or does not load.
    """
    opened = open_adapter(request)
    plan = _planned(opened, families=families)
    family, negative = plan.family, plan.sections.validation.validation_negative_prompt
    texts, strengths = {each.text for _, each in plan.cells}, {each.strength for _, each in plan.cells}
    family.load_text_encoders()
    in_text = attach_in_text(family, opened.stored, opened.tokens)
    embeds = encode(family, in_text, {*texts, negative}, strengths=strengths)
    applied = list(family.text_encoders)
    family.unload_text_encoders()
    pipeline = plan.make_pipeline()
    images: list[Image.Image] = []
    with (
        attached(pipeline, opened.stored, encoders=applied, schedule=opened.request.schedule) as set_strength,
        image_progress(len(plan.cells)) as progress,
    ):
        del opened
        for column, prompt in plan.cells:
            set_strength(prompt.strength)
            own = embeds[prompt.strength]
            image = generate(
                family,
                pipeline,
                prompt,
                texts=(own[prompt.text], own[negative]),
                config=column.validation,
                start=plan.start,
                on_step=lambda share: progress(len(images) + share),
            )
            images.append(image)
            file = unused(output / f"{prompt.name}{file_suffix(column.title)}.png")
            save_png(image, file, parameters=plan.description(column, prompt))
            yield file
    if len(plan.columns) > 1:
        file = unused(output / GRID_FILE)
        save_png(_grid(plan, images), file)
        yield file


def _planned(opened: Opened, *, families: Mapping[str, ModelSpec]) -> _Images:
    """The images of a request.

    Raises:
        ConfigError: Values are invalid, or the family has no such pipeline.
        DataError: A reference image or the image to start from cannot be used.
        ModelError: The model is missing.
    """
    request = opened.request
    every = [
        sections_of(
            replace(request, validation={**request.validation, **each}),
            header=opened.header,
            families=families,
        )
        for each in request.columns
    ]
    if not every[0].validation.prompts:
        raise ConfigError("No prompt is given. Give --prompt or --prompts-file.")
    start = None
    if request.start is not None:
        steps = min(each.validation.validation_num_inference_steps for each in every)
        start = read_start(request.start, steps=steps)
    family = make_family(every[0], dtype=request.dtype)
    if start is not None:
        check_pipeline(family, start)
    if "validation_resolution" not in request.validation:
        edge = family.default_resolution
        size = Size(edge, edge)
        if start is not None:
            size = start.size(edge, alignment=family.spec.pixel_alignment)
        every = [each.at_size(size) for each in every]
    prompts = with_references(
        expand_prompts(every[0].validation, seed=0, seeds=request.seeds),
        alignment=family.spec.pixel_alignment,
        fills_image=False,
    )
    titles = [", ".join(TITLES[key].format(value) for key, value in each.items()) for each in request.columns]
    columns = [
        _Column(
            title,
            each.validation,
            tuple(
                replace(prompt, strength=own.strength)
                for prompt, own in zip(
                    prompts, expand_prompts(each.validation, seed=0, seeds=request.seeds), strict=True
                )
            ),
        )
        for title, each in zip(titles, every, strict=True)
    ]
    return _Images(request=request, family=family, sections=every[0], columns=columns, start=start)


def _grid(plan: _Images, images: Sequence[Image.Image]) -> Image.Image:
    width = len(plan.columns)
    rows = [
        Row(prompt.label_of_row, tuple(images[index : index + width]))
        for index, (_, prompt) in enumerate(plan.cells)
        if index % width == 0
    ]
    return labelled_grid(rows, columns=[column.title for column in plan.columns])


def file_suffix(title: str) -> str:
    """The end of a file name by the title of a column; "" for the only one."""
    return f"-{file_name(title)}" if title else ""


def _of_whole_model(request: SampleRequest) -> tuple[SampleRequest, Mapping[str, str]]:
    """The request with the folder as the model's denoiser, and the header of its weights.

    Raises:
        ConfigError: A strength or a rank schedule is given.
        ModelError: It is no denoiser of a known family.
    """
    folder = request.adapter
    given = [request.validation, *request.columns]
    strengths = [each[STRENGTH_KEY] for each in given if STRENGTH_KEY in each]
    if request.schedule or request.opens_ranks or any(str(each) not in ("1", "1.0") for each in strengths):
        raise ConfigError(f"{folder} is a whole model, which has no strength and no rank schedule.")
    found = find_denoiser(str(folder), option="ADAPTER")
    weights = sorted(folder.glob(f"*{FILE_SUFFIX}"))
    denoiser = {f"pretrained_{found.spec.denoiser_name}_model_name_or_path": str(folder)}
    model = {"model_family": found.family, **denoiser, **request.model}
    return replace(request, model=model), read_metadata(weights[0], error=ModelError)


def sections_of(
    request: SampleRequest, *, header: Mapping[str, str], families: Mapping[str, ModelSpec]
) -> Sections:
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
    if request.prompts_file is not None:
        prompts += read_prompts(request.prompts_file, source, images=images)
    if STRENGTH_KEY in request.validation:
        prompts = tuple(each.model_copy(update={"strength": None}) for each in prompts)
    if any(each.images for each in prompts) and not spec.reference_flavours:
        source.add("validation_reference_images", f"{spec.name} takes no reference images. Remove it.")
    problems.raise_if_any()
    return Sections(
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


def make_family(sections: Sections, *, dtype: str | None) -> ModelFamily:
    """The model family of these sections, on the accelerator if there is one."""
    device = default_device()
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


def load_denoiser(family: ModelFamily, sections: Sections) -> nn.Module:
    """The family's denoiser in the precision of these sections, on the device."""
    precision = sections.precision.base_model_precision
    return quantize_and_move(family.load_denoiser(), precision=precision, device=family.device).eval()


def default_device() -> torch.device:
    """The accelerator if there is one, else the processor."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
