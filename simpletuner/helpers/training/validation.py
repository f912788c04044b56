"""Validation images during training: of the base model, of another run's adapter, and of this run's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from simpletuner.helpers.adapters.trainable import FULL_STRENGTH
from simpletuner.helpers.checkpointing.intervals import Epochs, num_due
from simpletuner.helpers.io.atomic import remove_leftovers, write_json
from simpletuner.helpers.io.faults import storage_error
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import (
    EMA_FOLDER,
    GRID_FILE,
    SCORES_FILE,
    image_file,
    validation_files,
    validation_step_folder,
    validation_step_folders,
)
from simpletuner.helpers.sampling.images import Row, labelled_grid, save_png

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.adapters.ema import Ema
    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.models.clip_score import ClipScorer
    from simpletuner.helpers.reporting.trackers import Trackers
    from simpletuner.helpers.sampling.comparison import Comparison
    from simpletuner.helpers.sampling.prompts import PromptSpec
    from simpletuner.helpers.sampling.validation_sampler import ValidationSampler

logger = logging.getLogger(__name__)

ValidationType = Literal["base_model", "intermediary", "final"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UsedWeights:
    """Weights of the adapter of which validation images are generated."""

    use: Callable[[], AbstractContextManager[None]]
    """The context in which the adapter has them."""
    title: str = ""
    """After the adapter's title, in that of their column."""
    folder: str = ""
    """Of their images in the folder of a validation; empty for that folder itself."""
    score: str = "clip_score"


@dataclass(kw_only=True)
class Validation:
    """Generates the validation images of a run at their intervals, and arranges them in grids."""

    sampler: ValidationSampler
    trainable: Trainable
    denoiser: nn.Module
    """The pipeline's denoiser, without accelerate's wrapper."""
    title: str
    """Column title of this run's images."""
    comparison: Comparison | None
    """Another run's adapter; its images form a column before this run's."""
    trackers: Trackers
    scorer: ClipScorer | None = None
    epochs: Epochs = field(default_factory=Epochs)
    """Where epochs end, for validation_epoch_interval."""
    averages: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context in which the adapter has the weights for use."""
    ema: Ema | None = None
    pipeline: Any = None

    def is_due(self, step: int) -> bool:
        """Whether an interval asks for images after this optimiser step."""
        return self.epochs.is_due(step, **self._intervals())

    def images_left(self, step: int, *, max_steps: int) -> int:
        """Number of images that a run of max_steps generates after this step."""
        due = num_due(self.epochs, after=step, before=max_steps, **self._intervals())
        return (due + 1) * len(self.sampler.prompts) * len(self._weights())

    def grid_file(self, step: int) -> Path:
        """Path of a step's grid."""
        return validation_step_folder(self.sampler.folder, step) / GRID_FILE

    def start(self, step: int) -> None:
        """Before step 1: generate base-model images, and repeat a validation that was interrupted.

        Removes images of later steps: they belong to a run that was rolled back.

        Raises:
            StorageError: They cannot be removed.
        """
        config, accelerator = self.sampler.config, self.sampler.accelerator
        if self.sampler.prompts and accelerator.is_main_process:
            for later, folder in validation_step_folders(self.sampler.folder):
                if later > step:
                    _remove_images(folder, resumed_step=step)
        # Those of a whole model are generated before its weights change.
        has_base = not config.disable_benchmark and not self.trainable.is_model
        if self.sampler.prompts and has_base and accelerator.is_main_process:
            with self.sampler.best_effort("the base-model images"):
                self._generate_base_images()
        if (step == 0 and config.validation_on_startup) or self.is_due(step):
            self.run(step)

    def run(self, step: int, validation_type: ValidationType = "intermediary") -> None:
        """Generate the images and the grid of this step on the main process, unless the grid exists."""
        accelerator = self.sampler.accelerator
        if self.sampler.prompts and accelerator.is_main_process and not self.grid_file(step).exists():
            with self.sampler.best_effort(f"the validation of step {step}"):
                self._validate(step, validation_type)
        accelerator.wait_for_everyone()

    def setup_pipeline(self, validation_type: ValidationType = "intermediary") -> None:
        """Build the family's pipeline around the denoiser, with the rank schedule of training."""
        self.pipeline = self.sampler.make_pipeline(self.denoiser)
        if self.sampler.accelerator._tlora_active:
            self.pipeline._tlora_config = dict(self.sampler.accelerator._tlora_config)
        logger.debug("The pipeline for %s images is ready.", validation_type)

    def clean_pipeline(self) -> None:
        """Remove the rank schedule from the pipeline, and release the pipeline and the VAE."""
        if self.pipeline is not None:
            vars(self.pipeline).pop("_tlora_config", None)
            self.pipeline = None
        self.sampler.family.unload_vae()

    def manifest(self) -> dict[str, Any]:
        """The report's information on the images, by its keys: each prompt and its cached files."""
        sampler, other = self.sampler, self.comparison
        return {
            "compared_with": None if other is None else other.title,
            "shots": [
                {
                    "name": prompt.name,
                    "prompt": redacted(prompt.text),
                    "size": str(prompt.size),
                    "seed": prompt.seed,
                    "strength": prompt.strength,
                    "base": None if sampler.config.disable_benchmark else sampler.cached_path(prompt).name,
                    "other": None if other is None else other.cached_path(prompt).name,
                }
                for prompt in sampler.prompts
            ],
        }

    def _weights(self) -> list[UsedWeights]:
        plain = UsedWeights(use=self.averages)
        if self.ema is None or self.ema.config.ema_validation == "none":
            return [plain]
        average = UsedWeights(use=self.ema.weights, title=" EMA", folder=EMA_FOLDER, score="ema_clip_score")
        return [average] if self.ema.config.ema_validation == "ema_only" else [plain, average]

    def _intervals(self) -> dict[str, int]:
        config = self.sampler.config
        return {"steps": config.validation_step_interval, "epochs": config.validation_epoch_interval}

    def _generate_base_images(self) -> None:
        path = self.sampler.cached_path
        missing = {prompt: file for prompt in self.sampler.prompts if not (file := path(prompt)).exists()}
        if missing:
            with self._pipeline("base_model"):
                self.sampler.generate_all(
                    self.pipeline, missing, prepare=lambda _: self.trainable.set_strength(0.0)
                )

    def _validate(self, step: int, validation_type: ValidationType) -> None:
        folder, prompts = self.grid_file(step).parent, self.sampler.prompts
        files = {
            weights: {prompt: image_file(folder / weights.folder, prompt.name) for prompt in prompts}
            for weights in self._weights()
        }
        with self._pipeline(validation_type):
            for weights, own in files.items():
                with weights.use():
                    self.sampler.generate_all(
                        self.pipeline,
                        own,
                        prepare=lambda prompt: self.trainable.set_strength(prompt.strength),
                    )
        if self.scorer is not None:
            with self.sampler.best_effort(f"the CLIP scores of step {step}"):
                self._score(self.scorer, step, files)
        grid_file = self.grid_file(step)
        save_png(self._grid(step, files), grid_file)
        logger.info("Validation of step %d: %s", step, grid_file)
        images = {
            "-".join(filter(None, (prompt.name, weights.folder))): file
            for weights, own in files.items()
            for prompt, file in own.items()
        }
        self.trackers.log_images(step, {"grid": grid_file, **images})

    def _score(
        self, scorer: ClipScorer, step: int, files: Mapping[UsedWeights, Mapping[PromptSpec, Path]]
    ) -> None:
        scores = {
            weights.score: scorer.scores(
                {prompt.name: file for prompt, file in own.items()},
                {prompt.name: prompt.text for prompt in own},
            )
            for weights, own in files.items()
        }
        means = {name: sum(each.values()) / len(each) for name, each in scores.items()}
        write_json(validation_step_folder(self.sampler.folder, step) / SCORES_FILE, scores)
        for weights in files:
            mean = means[weights.score]
            logger.info("CLIP score of step %d%s: %.2f, the mean of its images.", step, weights.title, mean)
        self.trackers.log_scores(step, means)

    @contextmanager
    def _pipeline(self, validation_type: ValidationType) -> Iterator[None]:
        with self.sampler.eval_mode(self.denoiser):
            try:
                self.setup_pipeline(validation_type)
                yield
            finally:
                self.clean_pipeline()
                self.trainable.set_strength(FULL_STRENGTH)

    def _grid(self, step: int, files: Mapping[UsedWeights, Mapping[PromptSpec, Path]]) -> Image.Image:
        columns: dict[str, Callable[[PromptSpec], Path]] = {}
        if not self.sampler.config.disable_benchmark:
            columns["base model"] = self.sampler.cached_path
        if self.comparison is not None:
            columns[self.comparison.title] = self.comparison.cached_path
        columns |= {f"{self.title}{each.title}, step {step}": own.__getitem__ for each, own in files.items()}
        rows = [
            Row(prompt.label, tuple(_load_png(path(prompt)) for path in columns.values()))
            for prompt in self.sampler.prompts
        ]
        return labelled_grid(rows, columns=list(columns))


def _remove_images(folder: Path, *, resumed_step: int) -> None:
    """Remove the images of a validation, and its folder if that leaves nothing there."""
    try:
        remove_leftovers(folder, of_other_hosts=True)
        images = validation_files(folder)
        for file in images:
            file.unlink()
        if (folder / EMA_FOLDER).is_dir() and not any((folder / EMA_FOLDER).iterdir()):
            (folder / EMA_FOLDER).rmdir()
        kept = len(list(folder.iterdir()))
        if not kept:
            folder.rmdir()
    except OSError as error:
        raise storage_error(folder, error) from error
    logger.info(
        "Removed %d images of %s, a later step than %d, where this run goes on%s.",
        len(images),
        folder,
        resumed_step,
        f"; {kept} other files stay" if kept else "",
    )


def _load_png(file: Path) -> Image.Image | None:
    """The image; None for a missing file."""
    if not file.exists():
        return None
    with Image.open(file) as image:
        return image.convert("RGB")
