"""`simpletuner compare`: the same prompts and seeds with every checkpoint of some runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from simpletuner.helpers.contracts import ComparedColumn, ComparedGroup, ComparedRow, ModelSpec
from simpletuner.helpers.errors import ConfigError, ModelError, SimpleTunerError
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.models.clip_score import KEY as CLIP_KEY
from simpletuner.helpers.models.clip_score import ClipScorer
from simpletuner.helpers.sampling.attached import open_ranks
from simpletuner.helpers.sampling.compared_images import LoadedOnce, Shown, Variant
from simpletuner.helpers.sampling.contenders import (
    Contender,
    find_contenders,
    run_prompts,
    validation_settings,
)
from simpletuner.helpers.sampling.generating import image_progress
from simpletuner.helpers.sampling.sample_command import (
    SampleRequest,
    default_device,
    open_adapter,
    sections_of,
)

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.sampling.prompts import PromptSpec

logger = logging.getLogger(__name__)

CLIP = "CLIP score"
IMAGES_FOLDER = "images"
Measure = Callable[[Mapping[str, Path], Mapping[str, str]], Mapping[str, float]]
"""Name -> image file and name -> prompt, with the same names, to name -> score of those that have one."""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """The arguments of `simpletuner compare`."""

    runs: Sequence[Path]
    newest: int | None = None
    """Number of checkpoints of each run, the newest; None for all."""
    strengths: Sequence[float] = (1.0,)
    opens_ranks: bool = False
    """Show each T-LoRA with all ranks open too."""
    options: SampleRequest
    """What holds for every image; its adapter and its strength are not used."""


def compare(
    request: CompareRequest, *, output: Path, families: Mapping[str, ModelSpec]
) -> list[ComparedGroup]:
    """Generate the images that are not in `output` yet; a contender that fails keeps the reason.

    Returns:
        A group for each base model, whose weights are loaded once.

    Raises:
        ConfigError: There is no prompt, or values are invalid.
        AdapterError: A path has no adapter, or none of the files can be read.
        ModelError: A base model is missing or does not load.
    """
    shown: list[Shown] = []
    lost: list[ComparedColumn] = []
    errors: list[SimpleTunerError] = []
    for contender in find_contenders(request.runs, newest=request.newest):
        try:
            shown.append(_read(contender, request, families=families))
        except SimpleTunerError as error:
            errors.append(error)
            problem = redacted(str(error))
            lost.append(ComparedColumn(title=contender.title, run=contender.run, problem=problem))
    if not shown:
        raise errors[0]
    for column in lost:
        logger.warning("%s: %s", column.title, column.problem)
    groups: dict[str, list[Shown]] = {}
    for each in shown:
        groups.setdefault(_base_of(each), []).append(each)
    prompts = next(filter(None, map(_prompts_of, groups.values())), [])
    compared = [
        _compared(
            members,
            _prompts_of(members) or prompts,
            request=request,
            folder=output / IMAGES_FOLDER,
            families=families,
        )
        for members in groups.values()
    ]
    return [replace(compared[0], columns=(*compared[0].columns, *lost)), *compared[1:]]


def with_scores(group: ComparedGroup, name: str, measure: Measure) -> ComparedGroup:
    """The group with the mean of a measure for each column that has it."""
    prompts = {row.name: row.prompt for row in group.rows}
    keys = {
        f"{index} {row}": (index, row) for index, column in enumerate(group.columns) for row in column.images
    }
    files = {key: group.columns[index].images[row] for key, (index, row) in keys.items()}
    found = measure(files, {key: prompts[row] for key, (_, row) in keys.items()})
    by_column: dict[int, list[float]] = {}
    for key, score in found.items():
        by_column.setdefault(keys[key][0], []).append(score)
    columns = (
        replace(column, scores={**column.scores, name: fmean(by_column[index])})
        if index in by_column
        else column
        for index, column in enumerate(group.columns)
    )
    return replace(group, columns=tuple(columns))


def clip_measure(source: str) -> Measure:
    """The CLIP score by a model in transformers' layout.

    Raises:
        ModelError: It cannot be found.
    """
    try:
        return ClipScorer(source, device=default_device()).scores
    except ModelError as error:
        raise ModelError(str(error).replace(CLIP_KEY, "--clip-model")) from error


def _read(contender: Contender, request: CompareRequest, *, families: Mapping[str, ModelSpec]) -> Shown:
    """A contender with the sections that its file's header gives.

    Raises:
        SimpleTunerError: The file cannot be read, or its base model is unknown.
    """
    opened = open_adapter(replace(request.options, adapter=contender.file))
    has_ranks = request.opens_ranks and opened.stored is not None and open_ranks(opened.stored) is not None
    is_whole = contender.file.is_dir()
    strengths = (1.0,) if is_whole else request.strengths
    return Shown(
        contender=contender,
        sections=sections_of(opened.request, header=opened.header, families=families),
        header=opened.header,
        variants=tuple(
            Variant(strength, is_open)
            for is_open in ((False, True) if has_ranks else (False,))
            for strength in strengths
        ),
        is_whole=is_whole,
    )


def _base_of(shown: Shown) -> str:
    """The base model's section as text, without the denoiser of a whole model."""
    model = shown.sections.model
    own = {name: None for name in type(model).model_fields if "unet" in name or "transformer" in name}
    return repr(model.model_copy(update=own) if shown.is_whole else model)


def _prompts_of(members: Iterable[Shown]) -> list[str]:
    return next(filter(None, map(run_prompts, _runs(members))), [])


def _runs(members: Iterable[Shown]) -> list[Path]:
    """The output folders of their runs, each once."""
    runs = [each.contender.run for each in members if each.contender is not None]
    return [*dict.fromkeys(run for run in runs if run is not None)]


def _compared(
    members: Sequence[Shown],
    prompts: Sequence[str],
    *,
    request: CompareRequest,
    folder: Path,
    families: Mapping[str, ModelSpec],
) -> ComparedGroup:
    """The contenders of one base model; generates what is missing.

    Raises:
        ConfigError: There is no prompt, or values are invalid.
        ModelError: The base model is missing or does not load.
    """
    config = _config(members, prompts, request=request, families=families)
    by_denoiser: dict[str, list[Shown]] = {}
    for each in sorted(members, key=lambda each: each.is_whole):  # the base model is freed before them
        key = repr((each.sections.model, each.sections.precision))
        by_denoiser.setdefault(key, []).append(each)
    bases: list[Shown] = []
    rows: tuple[PromptSpec, ...] = ()
    for same in by_denoiser.values():
        first = same[0]
        if not first.is_whole:
            bases.append(Shown(contender=None, sections=first.sections, header=first.header))
            same.insert(0, bases[-1])
        try:
            rows = _generated(same, request.options, config=config, folder=folder)
        except ModelError as error:
            if not first.is_whole:
                raise
            first.fail(error)
    return ComparedGroup(
        model=_model_name(members[0]),
        settings=_settings(config),
        rows=tuple(
            ComparedRow(each.name, redacted(each.text), f"{each.size}, seed {each.seed}") for each in rows
        ),
        columns=tuple(column for each in (*bases, *members) for column in _columns(each)),
    )


def _generated(
    members: Sequence[Shown], options: SampleRequest, *, config: ValidationConfig, folder: Path
) -> tuple[PromptSpec, ...]:
    """Generate what contenders on one denoiser lack; the prompts of all images.

    Raises:
        ModelError: The model is missing or does not load.
    """
    loaded = LoadedOnce(members, options=options, config=config, folder=folder)
    if loaded.num_missing:
        logger.info("Generating %s from %s.", counted(loaded.num_missing, "image"), _model_name(members[0]))
        with image_progress(loaded.num_missing) as progress:
            loaded.generate(progress)
    return loaded.prompts


def _model_name(shown: Shown) -> str:
    return redacted(shown.sections.model.pretrained_model_name_or_path)


def _columns(shown: Shown) -> list[ComparedColumn]:
    contender, columns = shown.contender, []
    for variant in shown.variants:
        files = shown.images.get(variant, {})
        columns.append(
            ComparedColumn(
                title=redacted(shown.title),
                details=variant.details,
                run=None if contender is None else contender.run,
                step=None if contender is None else contender.step,
                images={name: file for name, file in files.items() if file.is_file()},
                problem=shown.problem,
                is_base=contender is None,
            )
        )
    return columns


def _config(
    members: Sequence[Shown],
    prompts: Sequence[str],
    *,
    request: CompareRequest,
    families: Mapping[str, ModelSpec],
) -> ValidationConfig:
    """The settings of all images: those of the first run that has any, under the command's.

    Raises:
        ConfigError: There is no prompt, or values are invalid.
    """
    options = request.options
    settings = next(filter(None, map(validation_settings, _runs(members))), {})
    given = replace(
        options,
        adapter=members[0].contender.file if members[0].contender else options.adapter,
        prompts=options.prompts if options.prompts or options.prompts_file else prompts,
        validation={**settings, **options.validation},
    )
    config = sections_of(given, header=members[0].header, families=families).validation
    if not config.prompts:
        raise ConfigError(
            "No prompt is given, and no run that is compared has validation images. Give --prompt or "
            "--prompts-file."
        )
    return config


def _settings(config: ValidationConfig) -> str:
    """For display."""
    real = config.validation_guidance_real
    parts = [
        f"{config.validation_num_inference_steps} steps",
        f"guidance {config.validation_guidance:g}",
        f"real guidance {real:g}" if real > 1 else "",
        f"sampler {config.validation_noise_scheduler}" if config.validation_noise_scheduler else "",
        f"negative prompt: {redacted(config.validation_negative_prompt)}"
        if config.validation_negative_prompt
        else "",
    ]
    return ", ".join(filter(None, parts))
