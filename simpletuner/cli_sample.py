"""`simpletuner sample`. Imports no torch."""

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simpletuner.cli_options import (
    SAMPLE_OPTIONS,
    AdapterArgument,
    BaseModel,
    EmbeddingFiles,
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
    ScheduleOption,
    Seeds,
    given_values,
    listed,
    one_adapter,
)
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.logs import configure_logging

if TYPE_CHECKING:
    from simpletuner.helpers.sampling.start_image import StartOptions

SAMPLES = Path("output/samples")
DENOISING_STRENGTH = 0.6
ImageFile = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", help="Start from this image (img2img).")
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask", metavar="FILE", help="Repaint the part of --image that is white here (inpainting)."
    ),
]
DenoisingStrength = Annotated[
    float | None,
    typer.Option(
        "--denoising-strength",
        metavar="SHARE",
        help=f"With --image: 1 keeps nothing of it. Default: {DENOISING_STRENGTH}.",
    ),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strength",
        "--strengths",
        metavar="S,...",
        help="Strength of the adapter, 1 as trained, 0 the base model; several make a grid. Default: 1, or "
        "adapter_strength of the prompts' json.",
    ),
]
OpenRanks = Annotated[
    bool,
    typer.Option("--open-ranks", help="Keep every rank of a T-LoRA active, to see what its schedule does."),
]


def sample_command(
    *,
    adapter: AdapterArgument = None,
    option: Annotated[
        Path | None, typer.Option("--adapter", metavar="ADAPTER", help="The same.", show_default=False)
    ] = None,
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    reference: References = None,
    image: ImageFile = None,
    mask: MaskFile = None,
    denoising_strength: DenoisingStrength = None,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Folder of the images; none is overwritten.")
    ] = SAMPLES,
    negative: Negative = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Default: that of --image, else the model's.")
    ] = None,
    steps: Annotated[
        str, typer.Option("--steps", metavar="N,...", help="Denoising steps; several make a grid.")
    ] = "30",
    guidance: Guidance = None,
    guidance_real: GuidanceReal = None,
    seed: Seeds = None,
    count: Annotated[
        int, typer.Option("--count", help="Images per prompt, size and seed; their seeds count up.")
    ] = 1,
    strength: Strengths = None,
    scheduler: SamplerName = None,
    model: BaseModel = None,
    family: FamilyName = None,
    precision: Precision = None,
    embedding: EmbeddingFiles = None,
    schedule: ScheduleOption = None,
    open_ranks: OpenRanks = False,
    dtype: ModelDtype = None,
) -> None:
    """Generate images with an adapter, or with the whole model of a run; its file names the base model."""
    configure_logging(main_process=True)
    from simpletuner.helpers.adapters.files.finding import find_model
    from simpletuner.helpers.configuration.schema.schedule_options import schedule_options
    from simpletuner.helpers.io.paths import portable
    from simpletuner.helpers.models import registry
    from simpletuner.helpers.sampling.sample_command import SampleRequest, sample

    for pair in (
        {"--image": image, "--reference": reference},
        {"--schedule": schedule, "--open-ranks": open_ranks},
    ):
        if all(pair.values()):
            raise ConfigError(f"{' and '.join(pair)} exclude each other. Remove one of them.")
    whole_model = find_model(adapter) if adapter is not None and option is None else None
    grid = {
        "validation_lycoris_strength": [] if strength is None else listed(strength),
        "validation_num_inference_steps": listed(steps),
    }
    request = SampleRequest(
        adapter=whole_model or one_adapter(adapter, option),
        prompts=prompt or (),
        prompts_file=prompts_file,
        model=given_values(model_family=family, pretrained_model_name_or_path=model),
        validation=given_values(
            validation_negative_prompt=negative,
            validation_resolution=size,
            validation_guidance=guidance,
            validation_guidance_real=guidance_real,
            validation_seed=0,
            num_validation_images=count,
            validation_noise_scheduler=scheduler,
            validation_reference_images=reference or None,
            **{key: values[0] for key, values in grid.items() if values},
        ),
        columns=_columns(grid),
        seeds=seed or (),
        start=_start(image, mask, denoising_strength),
        dtype=dtype,
        precision=given_values(base_model_precision=precision),
        embeddings=embedding or (),
        schedule=schedule_options(schedule) if schedule is not None else {},
        opens_ranks=open_ranks,
        options=SAMPLE_OPTIONS,
    )
    for file in sample(request, output=portable(output), families=registry.specs()):
        print(file)


def _start(image: Path | None, mask: Path | None, denoising_strength: float | None) -> "StartOptions | None":
    from simpletuner.helpers.sampling.start_image import StartOptions

    if image is None and (mask is not None or denoising_strength is not None):
        raise ConfigError("--mask and --denoising-strength are for --image. Give it, or remove them.")
    if image is None:
        return None
    share = DENOISING_STRENGTH if denoising_strength is None else denoising_strength
    return StartOptions(image, mask=mask, denoising_strength=share)


def _columns(grid: Mapping[str, list[str]]) -> list[dict[str, object]]:
    """Every combination of the keys with several values; without any, one column without a key."""
    several = {key: dict.fromkeys(values) for key, values in grid.items() if len(set(values)) > 1}
    return [dict(zip(several, each, strict=True)) for each in product(*several.values())]


COMMANDS: dict[str, Callable[..., None]] = {"sample": sample_command}
