"""Pictures while training: the base model, another run's adapter, and the one that is being trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from simpletuner.helpers.sampling.images import Row, labelled_grid, save_png

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.reporting.trackers import Trackers
    from simpletuner.helpers.sampling.comparison import Comparison
    from simpletuner.helpers.sampling.prompts import PromptSpec
    from simpletuner.helpers.sampling.validation_sampler import ValidationSampler

logger = logging.getLogger(__name__)

ValidationType = Literal["base_model", "intermediary", "final"]
GRID_FILE = "grid.png"
AS_TRAINED = 1.0


@dataclass(kw_only=True)
class Validation:
    """Decides when a run makes pictures and puts them side by side."""

    sampler: ValidationSampler
    adapter: Adapter
    denoiser: nn.Module
    """As the pipeline takes it, not as accelerate wraps it."""
    title: str
    """What the column of this run is called."""
    comparison: Comparison | None
    """Another run's adapter, whose pictures stand before this run's; None shows none."""
    trackers: Trackers
    pipeline: Any = None

    def is_due(self, step: int) -> bool:
        """Whether an interval asks for pictures after this optimiser step."""
        every = self.sampler.config.validation_step_interval
        return step > 0 and bool(every) and step % every == 0

    def grid_file(self, step: int) -> Path:
        """Where the grid of a step lies once it is made."""
        return self.sampler.folder / f"step-{step}" / GRID_FILE

    def start(self, step: int) -> None:
        """Before the first optimiser step: base-model pictures, and what a run cut short left undone.

        Pictures of later steps were made by a run that this one leaves behind, and are removed.
        """
        config, accelerator = self.sampler.config, self.sampler.accelerator
        if self.sampler.shots and accelerator.is_main_process:
            for folder in self.sampler.folder.glob("step-*"):
                number = folder.name.removeprefix("step-")
                if number.isdigit() and int(number) > step:
                    shutil.rmtree(folder)
        if self.sampler.shots and not config.disable_benchmark and accelerator.is_main_process:
            self.sampler.best_effort("the base-model pictures", self._base_pictures)
        if (step == 0 and config.validation_on_startup) or self.is_due(step):
            self.run(step)

    def run(self, step: int, kind: ValidationType = "intermediary") -> None:
        """Make the pictures and the grid of this step on the main process, unless the grid is there."""
        accelerator = self.sampler.accelerator
        if self.sampler.shots and accelerator.is_main_process and not self.grid_file(step).exists():
            self.sampler.best_effort(f"the validation of step {step}", lambda: self._validate(step, kind))
        accelerator.wait_for_everyone()

    def setup_pipeline(self, validation_type: ValidationType = "intermediary") -> None:
        """Build the bundled pipeline around the denoiser, with the rank schedule it trains under."""
        self.pipeline = self.sampler.make_pipeline(self.denoiser)
        if self.sampler.accelerator._tlora_active:
            self.pipeline._tlora_config = dict(self.sampler.accelerator._tlora_config)
        logger.debug("Pipeline for %s pictures is ready.", validation_type)

    def clean_pipeline(self) -> None:
        """Take the rank schedule off the pipeline and let go of it, and of the VAE it decoded with."""
        if self.pipeline is not None:
            if self.sampler.accelerator._tlora_active:
                del self.pipeline._tlora_config
            self.pipeline = None
        self.sampler.family.unload_vae()

    def _base_pictures(self) -> None:
        """Make the pictures of the base model that are not on disk yet."""
        cached_path = self.sampler.cached_path
        missing = {shot: file for shot in self.sampler.shots if not (file := cached_path(shot)).exists()}
        if missing:
            with self._sampling("base_model"):
                for shot, file in missing.items():
                    self._make(shot, strength=0.0, file=file)

    def _validate(self, step: int, kind: ValidationType) -> None:
        folder = self.grid_file(step).parent
        files = {shot: folder / f"{shot.name}.png" for shot in self.sampler.shots}
        with self._sampling(kind):
            for shot, file in files.items():
                self._make(shot, strength=shot.strength, file=file)
        grid = self._grid(step, files)
        save_png(grid, self.grid_file(step))
        logger.info("Validation of step %d: %s", step, self.grid_file(step))
        self.trackers.log_images(
            step, {"grid": self.grid_file(step), **{shot.name: file for shot, file in files.items()}}
        )

    @contextmanager
    def _sampling(self, kind: ValidationType) -> Iterator[None]:
        """The model in the pipeline; back to training, at full strength, after it."""
        with self.sampler.sampling(self.denoiser):
            try:
                self.setup_pipeline(kind)
                yield
            finally:
                self.clean_pipeline()
                self.adapter.set_strength(AS_TRAINED)

    def _make(self, shot: PromptSpec, *, strength: float, file: Path) -> None:
        self.adapter.set_strength(strength)
        self.sampler.make(self.pipeline, shot, file)

    def _grid(self, step: int, files: Mapping[PromptSpec, Path]) -> Image.Image:
        columns: dict[str, Callable[[PromptSpec], Path]] = {}
        if not self.sampler.config.disable_benchmark:
            columns["base model"] = self.sampler.cached_path
        if self.comparison is not None:
            columns[self.comparison.title] = self.comparison.picture
        columns[f"{self.title}, step {step}"] = files.__getitem__
        rows = [
            Row(shot.label, tuple(_load_png(file_of(shot)) for file_of in columns.values())) for shot in files
        ]
        return labelled_grid(rows, columns=list(columns))


def _load_png(file: Path) -> Image.Image | None:
    """The picture, or None when it was never made."""
    if not file.exists():
        return None
    with Image.open(file) as picture:
        return picture.convert("RGB")
