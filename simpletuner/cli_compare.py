"""`simpletuner compare`. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli_options import (
    SAMPLE_OPTIONS,
    BaseModel,
    FamilyName,
    Guidance,
    GuidanceReal,
    ModelDtype,
    Negative,
    Precision,
    Prompts,
    PromptsFile,
    References,
    SamplerName,
    Seeds,
    given_values,
    listed,
)
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.logs import configure_logging

FOLDER = Path("output/compare")
PAGE = "compare.html"
Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...",
        help="Folders or names of runs, checkpoints, adapter files, or folders of these.",
        show_default=False,
    ),
]
OpenRanks = Annotated[
    bool,
    typer.Option("--open-ranks", help="Show each T-LoRA with every rank active too, beside its schedule."),
]
ClipModel = Annotated[
    str | None,
    typer.Option(
        "--clip-model",
        metavar="MODEL",
        help="Score the images by this CLIP model: a folder in transformers' layout, or its repository.",
    ),
]


def compare_command(
    *,
    runs: Runs,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    reference: References = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="DIR",
            help=f"Folder of {PAGE} and its images; a second call makes only the images that it lacks.",
        ),
    ] = FOLDER,
    checkpoints: Annotated[
        int | None,
        typer.Option("--checkpoints", metavar="N", min=1, help="The newest of each run. Default: all."),
    ] = None,
    strengths: Annotated[
        str,
        typer.Option("--strengths", "--strength", metavar="S,...", help="Strengths of the adapters."),
    ] = "1",
    open_ranks: OpenRanks = False,
    clip_model: ClipModel = None,
    negative: Negative = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance: Guidance = None,
    guidance_real: GuidanceReal = None,
    seed: Seeds = None,
    scheduler: SamplerName = None,
    model: BaseModel = None,
    family: FamilyName = None,
    precision: Precision = None,
    dtype: ModelDtype = None,
) -> None:
    """Write a page of the same prompts and seeds with each checkpoint of some runs, and find the best.

    What is not given is as in the validation of the first run: prompts, size, steps, guidance, seed.
    Exit code 1 if there are images of base models alone.
    """
    configure_logging(main_process=True)
    from simpletuner.demo.alignment import MEASURE, alignment, is_embedded
    from simpletuner.helpers.io.paths import portable
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.reporting.compare_page.page import write_page
    from simpletuner.helpers.sampling.compare_command import (
        CLIP,
        CompareRequest,
        clip_measure,
        compare,
        with_scores,
    )
    from simpletuner.helpers.sampling.sample_command import SampleRequest

    clip = None if clip_model is None else clip_measure(clip_model)
    options = SampleRequest(
        adapter=runs[0],
        prompts=prompt or (),
        prompts_file=prompts_file,
        model=given_values(model_family=family, pretrained_model_name_or_path=model),
        validation=given_values(
            validation_negative_prompt=negative,
            validation_resolution=size,
            validation_num_inference_steps=steps,
            validation_guidance=guidance,
            validation_guidance_real=guidance_real,
            num_validation_images=None if seed is None else 1,
            validation_noise_scheduler=scheduler,
            validation_reference_images=reference or None,
        ),
        seeds=seed or (),
        dtype=dtype,
        precision=given_values(base_model_precision=precision),
        options=SAMPLE_OPTIONS,
    )
    request = CompareRequest(
        runs=runs,
        newest=checkpoints,
        strengths=_numbers(strengths),
        opens_ranks=open_ranks,
        options=options,
    )
    folder = portable(output)
    groups = compare(request, output=folder, families=registry.specs())
    if clip is not None:
        groups = [with_scores(each, CLIP, clip) for each in groups]
    groups = [with_scores(each, MEASURE, alignment) if is_embedded(each.model) else each for each in groups]
    for line in write_page(folder / PAGE, groups):
        print(line)
    if not any(column.images for each in groups for column in each.columns if not column.is_base):
        raise typer.Exit(1)


def _numbers(text: str) -> list[float]:
    try:
        return [*dict.fromkeys(map(float, listed(text)))]
    except ValueError:
        raise ConfigError(f"--strengths {text}: must be numbers, as in 0.5,1.") from None


COMMANDS: dict[str, Callable[..., None]] = {"compare": compare_command}
