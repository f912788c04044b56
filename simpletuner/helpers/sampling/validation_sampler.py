"""Where the pictures of a run are made, whatever adapter its denoiser carries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from simpletuner.helpers.checkpointing.preemption import Preempted
from simpletuner.helpers.sampling.images import save_png
from simpletuner.helpers.sampling.prompts import call_options

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.sampling.prompts import PromptSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ValidationSampler:
    """Makes the pictures that a run asks for; one that fails costs itself, never the run."""

    config: ValidationConfig
    accelerator: Accelerator
    family: ModelFamily
    shots: tuple[PromptSpec, ...]
    text_embeds: Callable[[str], TextEmbeds]
    folder: Path
    """`<output_dir>/validation`."""
    base_model: str
    """Identity of the base model's weights."""
    preemption: Preemption

    def cached_path(self, shot: PromptSpec, *made_with: object) -> Path:
        """Where a picture lies that no training changes, named after all that it was made with."""
        config = self.config
        depends_on = (
            self.base_model,
            shot.prompt,
            config.validation_negative_prompt,
            config.validation_guidance,
            config.validation_guidance_real,
            config.validation_guidance_rescale,
            config.validation_num_inference_steps,
            config.validation_noise_scheduler,
            self.family.noise,  # which says how sampling is shifted
            *made_with,
        )
        return self.folder / "base" / f"{shot.name}-{xxhash.xxh3_64_hexdigest(repr(depends_on).encode())}.png"

    def make_pipeline(self, denoiser: nn.Module) -> Any:
        """The bundled pipeline around the denoiser as it is."""
        return self.family.make_pipeline(denoiser, scheduler=self.config.validation_noise_scheduler)

    @contextmanager
    def sampling(self, denoiser: nn.Module) -> Iterator[None]:
        """The denoiser in evaluation mode, without gradients; as it was, and without a VAE, afterwards."""
        was_training = denoiser.training
        denoiser.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.family.unload_vae()
            denoiser.train(was_training)

    def make(self, pipeline: Any, shot: PromptSpec, file: Path) -> None:
        """Make one picture.

        Raises:
            Preempted: A signal came.
        """
        self.preemption.check("making validation pictures")
        text = self.family.pipeline_inputs(
            self.text_embeds(shot.prompt),
            self.text_embeds(self.config.validation_negative_prompt),
            validation=self.config,
            size=shot.size,
        )
        picture = pipeline(
            **text, **call_options(shot, self.config), callback_on_step_end=self._between_steps
        ).images[0]
        save_png(picture, file)

    def best_effort(self, what: str, make: Callable[[], None]) -> None:
        """Make pictures, and say what is lost if that fails."""
        started_s = time.perf_counter()
        try:
            make()
            logger.debug("Made %s in %.1f s.", what, time.perf_counter() - started_s)
        except Preempted:
            logger.info("Left %s for the next start.", what)
        except Exception as error:  # noqa: BLE001 - named boundary: a validation must never end a run
            logger.warning("Lost %s: %s: %s. Training goes on without it.", what, type(error).__name__, error)

    def _between_steps(self, *_: object) -> dict[str, Any]:
        self.preemption.check("making validation pictures")
        return {}  # changes none of the pipeline's tensors
