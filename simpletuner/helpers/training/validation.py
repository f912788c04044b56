"""Pictures while training: the bundled pipeline, the base model beside the trained one."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from PIL import Image

from simpletuner.helpers.training.pictures import Row, labelled_grid, save_png
from simpletuner.helpers.training.preemption import Preempted
from simpletuner.helpers.training.prompts import call_options

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.configuration.sections import ValidationConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.models.family import Family
    from simpletuner.helpers.training.preemption import Preemption
    from simpletuner.helpers.training.prompts import Shot
    from simpletuner.helpers.training.trackers import Trackers

logger = logging.getLogger(__name__)

ValidationType = Literal["base_model", "intermediary", "final"]
GRID_FILE = "grid.png"
AS_TRAINED = 1.0


@dataclass(kw_only=True)
class Validation:
    """Makes the pictures of a run; a picture that fails costs itself, never the run."""

    config: ValidationConfig
    accelerator: Accelerator
    family: Family
    adapter: Adapter
    denoiser: nn.Module
    """As the pipeline takes it, not as accelerate wraps it."""
    shots: tuple[Shot, ...]
    text_embeds: Callable[[str], TextEmbeds]
    folder: Path
    """`<output_dir>/validation`."""
    base_model: str
    """What the base-model pictures depend on beside the settings."""
    trackers: Trackers
    preemption: Preemption
    pipeline: Any = None

    def is_due(self, step: int) -> bool:
        """Whether an interval asks for pictures after this optimiser step."""
        every = self.config.validation_step_interval
        return step > 0 and bool(every) and step % every == 0

    def grid_file(self, step: int) -> Path:
        """Where the grid of a step lies once it is made."""
        return self.folder / f"step-{step}" / GRID_FILE

    def start(self, step: int) -> None:
        """Before the first optimiser step: base-model pictures, and what a run cut short left undone.

        Pictures of later steps were made by a run that this one leaves behind, and are removed.
        """
        if self.shots and self.accelerator.is_main_process:
            for folder in self.folder.glob("step-*"):
                number = folder.name.removeprefix("step-")
                if number.isdigit() and int(number) > step:
                    shutil.rmtree(folder)
        if self.shots and not self.config.disable_benchmark and self.accelerator.is_main_process:
            self._guarded("the base-model pictures", self._base_pictures)
        if (step == 0 and self.config.validation_on_startup) or self.is_due(step):
            self.run(step)

    def run(self, step: int, kind: ValidationType = "intermediary") -> None:
        """Make the pictures and the grid of this step on the main process, unless the grid is there."""
        if self.shots and self.accelerator.is_main_process and not self.grid_file(step).exists():
            self._guarded(f"the validation of step {step}", lambda: self._validate(step, kind))
        self.accelerator.wait_for_everyone()

    def setup_pipeline(self, validation_type: ValidationType = "intermediary") -> None:
        """Build the bundled pipeline around the denoiser, with the rank schedule it trains under."""
        self.pipeline = self.family.make_pipeline(
            self.denoiser, scheduler=self.config.validation_noise_scheduler
        )
        if self.accelerator._tlora_active:
            self.pipeline._tlora_config = dict(self.accelerator._tlora_config)
        logger.debug("Pipeline for %s pictures is ready.", validation_type)

    def clean_pipeline(self) -> None:
        """Take the rank schedule off the pipeline and let go of it, and of the VAE it decoded with."""
        if self.pipeline is not None:
            if self.accelerator._tlora_active:
                del self.pipeline._tlora_config
            self.pipeline = None
        self.family.unload_vae()

    def _guarded(self, what: str, make: Callable[[], None]) -> None:
        started_s = time.perf_counter()
        try:
            make()
            logger.debug("Made %s in %.1f s.", what, time.perf_counter() - started_s)
        except Preempted:
            logger.info("Left %s for the next start.", what)
        except Exception as error:  # noqa: BLE001 - named boundary: a validation must never end a run
            logger.warning("Lost %s: %s: %s. Training goes on without it.", what, type(error).__name__, error)

    def _base_pictures(self) -> None:
        """Make the pictures of the base model that are not on disk yet."""
        missing = [shot for shot in self.shots if not self._base_file(shot).exists()]
        if missing:
            with self._sampling("base_model"):
                for shot in missing:
                    self._make(shot, strength=0.0, file=self._base_file(shot))

    def _validate(self, step: int, kind: ValidationType) -> None:
        folder = self.grid_file(step).parent
        files = {shot: folder / f"{shot.name}.png" for shot in self.shots}
        with self._sampling(kind):
            for shot, file in files.items():
                self._make(shot, strength=shot.strength, file=file)
        grid = self._grid(step, files)
        save_png(grid, self.grid_file(step))
        logger.info("Validation of step %d: %s", step, self.grid_file(step))
        self.trackers.log_pictures(
            step, {"grid": self.grid_file(step), **{shot.name: file for shot, file in files.items()}}
        )

    @contextmanager
    def _sampling(self, kind: ValidationType) -> Iterator[None]:
        """The model in evaluation mode inside the pipeline; back to training, at full strength, after it."""
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            self.setup_pipeline(kind)
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            self.clean_pipeline()
            self.adapter.set_strength(AS_TRAINED)
            self.denoiser.train(was_training)

    def _make(self, shot: Shot, *, strength: float, file: Path) -> None:
        self.preemption.check("making validation pictures")
        self.adapter.set_strength(strength)
        text = self.family.pipeline_inputs(
            self.text_embeds(shot.prompt), self.text_embeds(self.config.validation_negative_prompt)
        )
        picture = self.pipeline(
            **text, **call_options(shot, self.config), callback_on_step_end=self._between_steps
        ).images[0]
        save_png(picture, file)

    def _between_steps(self, *_: object) -> dict[str, Any]:
        self.preemption.check("making validation pictures")
        return {}  # changes none of the pipeline's tensors

    def _base_file(self, shot: Shot) -> Path:
        config = self.config
        depends_on = (
            self.base_model,
            shot.prompt,
            config.validation_negative_prompt,
            config.validation_guidance,
            config.validation_guidance_rescale,
            config.validation_num_inference_steps,
            config.validation_noise_scheduler,
        )
        return self.folder / "base" / f"{shot.name}-{xxhash.xxh3_64_hexdigest(repr(depends_on).encode())}.png"

    def _grid(self, step: int, files: Mapping[Shot, Path]) -> Image.Image:
        rows, columns = [], [f"step {step}"]
        if not self.config.disable_benchmark:
            columns.insert(0, "base model")
        for shot, file in files.items():
            sources = [self._base_file(shot), file][-len(columns) :]
            rows.append(Row(shot.label, tuple(map(_load_png, sources))))
        return labelled_grid(rows, columns=columns)


def _load_png(file: Path) -> Image.Image | None:
    """The picture, or None when it was never made."""
    if not file.exists():
        return None
    with Image.open(file) as picture:
        return picture.convert("RGB")
