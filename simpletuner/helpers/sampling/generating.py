"""Generate one image with a loaded pipeline, and describe it in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simpletuner.helpers.io.logs import terminal
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.sampling.prompts import pipeline_inputs
from simpletuner.helpers.sampling.start_image import arguments_of

if TYPE_CHECKING:
    from PIL import Image

    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.sampling.prompts import PromptSpec
    from simpletuner.helpers.sampling.start_image import StartImage

SIZE_ARGUMENTS = ("height", "width")


def generate(
    family: ModelFamily,
    pipeline: Any,
    prompt: PromptSpec,
    *,
    texts: tuple[TextEmbeds, TextEmbeds],
    config: ValidationConfig,
    start: StartImage | None = None,
    on_step: Callable[[float], None] = lambda _: None,
) -> Image.Image:
    """The image of a prompt.

    Args:
        family: Of the pipeline.
        pipeline: With the adapter at the prompt's strength.
        prompt: Text, size and seed.
        texts: Embeds of the prompt and of the negative prompt.
        config: Guidance and number of steps.
        start: The image to start from.
        on_step: Called after each denoising step, with the share of the image's steps that are done.
    """
    steps = config.validation_num_inference_steps * (1.0 if start is None else start.denoising_strength)

    def after_step(_pipeline: object, index: int, *_: object) -> dict[str, Any]:
        on_step(min(1.0, (index + 1) / steps))
        return {}  # a step callback returns the pipeline tensors to replace

    inputs = pipeline_inputs(family, prompt, texts=texts, config=config)
    if start is not None:
        taken = arguments_of(type(pipeline))
        # Some pipelines read the size from the image alone.
        sizes = {key: inputs.pop(key) for key in SIZE_ARGUMENTS}
        inputs |= start.inputs(prompt.size) | {key: sizes[key] for key in SIZE_ARGUMENTS if key in taken}
    with family.sampling_context(pipeline, validation=config):
        image: Image.Image = pipeline(**inputs, callback_on_step_end=after_step).images[0]
    return image


def description(
    prompt: PromptSpec, config: ValidationConfig, *, start: StartImage | None = None, **others: object
) -> str:
    """The parameters of an image in the text that image programs write and read, redacted.

    `others` are further names and values; None is left out.
    """
    guidance = config.validation_guidance
    real = config.validation_guidance_real
    values = {
        "Steps": config.validation_num_inference_steps,
        "Sampler": config.validation_noise_scheduler,
        "CFG scale": f"{guidance:g}",
        "True CFG scale": f"{real:g}" if real > 1 else None,
        "Seed": prompt.seed,
        "Size": prompt.size,
        "Denoising strength": None if start is None else f"{start.denoising_strength:g}",
        **{name.replace("_", " ").capitalize(): value for name, value in others.items()},
    }
    negative = config.validation_negative_prompt
    lines = [
        prompt.text,
        *([f"Negative prompt: {negative}"] if negative else []),
        ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None),
    ]
    return redacted("\n".join(lines))


@contextmanager
def image_progress(total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on the terminal, and none elsewhere; yields the function that sets the images so far."""
    console = terminal()
    with Progress(
        TextColumn("image"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("image", total=total)
        yield lambda done: progress.update(task, completed=done)
