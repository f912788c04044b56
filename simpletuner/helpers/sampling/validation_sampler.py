"""Generates validation images with the current denoiser."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from simpletuner.helpers.checkpointing.preemption import Preempted
from simpletuner.helpers.io.run_folder import cached_image_file
from simpletuner.helpers.models.compiling import compiled_for_validation
from simpletuner.helpers.sampling.images import save_png
from simpletuner.helpers.sampling.prompts import pipeline_inputs, pipeline_type

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.configuration.schema.compiling import CompileConfig
    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily
    from simpletuner.helpers.sampling.prompts import PromptSpec

logger = logging.getLogger(__name__)


def _shows_nothing(_number: int, _total: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class ValidationSampler:
    """Generates the run's validation images; a failure costs the image, never the run."""

    config: ValidationConfig
    compiling: CompileConfig
    accelerator: Accelerator
    family: ModelFamily
    prompts: tuple[PromptSpec, ...]
    text_embeds: Callable[[str], TextEmbeds]
    """Cached prompt embeds of a text."""
    folder: Path
    """`<output_dir>/validation`."""
    base_model: str
    """Identity of the base model's weights."""
    preemption: Preemption
    progress: Callable[[int, int], AbstractContextManager[None]] = _shows_nothing
    """Entered around the generation of an image: its number and the number of all."""

    def cached_path(self, prompt: PromptSpec, *also_hashed: object) -> Path:
        """Cache path of an image that training does not change.

        Its name hashes everything the image depends on.
        """
        config = self.config
        unguided = config.validation_no_cfg_until_timestep if config.validation_guidance_real > 1 else 0
        depends_on = (
            self.base_model,
            prompt.text,
            config.validation_negative_prompt,
            config.validation_guidance,
            config.validation_guidance_real,
            config.validation_guidance_rescale,
            config.validation_num_inference_steps,
            config.validation_noise_scheduler,
            self.family.noise,  # the shift of the sampling schedule is in it
            *([f"first {unguided} steps without guidance"] if unguided else []),
            *(f"reference {each.digest}" for each in prompt.references),
            *also_hashed,
        )
        digest = xxhash.xxh3_64_hexdigest(repr(depends_on).encode())
        return cached_image_file(self.folder, prompt.name, digest=digest)

    def make_pipeline(self, denoiser: nn.Module) -> Any:
        """The family's pipeline around a denoiser, with the validation sampler."""
        return self.family.make_pipeline(
            denoiser, pipeline_type(self.prompts), scheduler=self.config.validation_noise_scheduler
        )

    @contextmanager
    def eval_mode(self, denoiser: nn.Module) -> Iterator[None]:
        """Evaluation mode under autocast without gradients; restores the mode and unloads the VAE on exit."""
        was_training = denoiser.training
        denoiser.eval()
        try:
            with (
                torch.no_grad(),
                self.accelerator.autocast(),
                compiled_for_validation(denoiser, self.compiling),
            ):
                yield
        finally:
            self.family.unload_vae()
            denoiser.train(was_training)

    def generate_all(
        self, pipeline: Any, files: Mapping[PromptSpec, Path], *, prepare: Callable[[PromptSpec], None]
    ) -> None:
        """Generate the image of each prompt into its file; `prepare` is called before each.

        Raises:
            Preempted: A stop signal arrived.
        """
        for number, (prompt, file) in enumerate(files.items(), start=1):
            with self.progress(number, len(files)):
                prepare(prompt)
                self.generate(pipeline, prompt, file)

    def generate_base(self, denoiser: nn.Module) -> None:
        """Generate the missing images of the base model with its denoiser, before training changes that."""
        files = {prompt: self.cached_path(prompt) for prompt in self.prompts}
        missing = {prompt: file for prompt, file in files.items() if not file.exists()}
        if missing and not self.config.disable_benchmark:
            with self.best_effort("the base-model images"), self.eval_mode(denoiser):
                self.generate_all(self.make_pipeline(denoiser), missing, prepare=lambda _: None)

    def generate(self, pipeline: Any, prompt: PromptSpec, file: Path) -> None:
        """Generate the image of a prompt and write it as PNG.

        Raises:
            Preempted: A stop signal arrived.
        """
        self._check_preemption()
        negative = self.config.validation_negative_prompt
        texts = self.text_embeds(prompt.text), self.text_embeds(negative)
        inputs = pipeline_inputs(self.family, prompt, texts=texts, config=self.config)
        with self.family.sampling_context(pipeline, validation=self.config):
            image = pipeline(**inputs, callback_on_step_end=self._check_preemption).images[0]
        save_png(image, file)

    @contextmanager
    def best_effort(self, images: str) -> Iterator[None]:
        """Log a failure inside the context instead of raising it; `images` names the loss in the log."""
        started_s = time.perf_counter()
        try:
            yield
            logger.debug("Generated %s in %.1f s.", images, time.perf_counter() - started_s)
        except Preempted:
            logger.info("Interrupted: %s will be generated on resume.", images)
        except Exception as error:  # noqa: BLE001 - named boundary: a validation must never end a run
            logger.warning("Lost %s: %s: %s. Training continues.", images, type(error).__name__, error)

    def _check_preemption(self, *_: object) -> dict[str, Any]:
        self.preemption.check("generating validation images")
        return {}  # a step callback returns the pipeline tensors to replace
