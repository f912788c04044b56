"""Fill the caches of latents and embeddings, with each encoder in memory only while it is needed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from simpletuner.helpers.checkpointing.preemption import Preemption
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.models.family import ModelFamily

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@dataclass(kw_only=True, slots=True)
class CacheFiller:
    """Encodes what the caches lack, shared among the processes."""

    config: RunConfig
    accelerator: Accelerator
    family: ModelFamily
    preemption: Preemption

    def fill(self, data: TrainingData, *, prompts: Sequence[str]) -> None:
        """Encode every image and caption of the data, and these prompts; nothing stays loaded.

        Raises:
            Preempted: A signal came; what is encoded so far is kept.
            DataError: A result is not finite.
            ModelError: An encoder cannot be loaded.
        """
        self._images(data)
        self._texts(data, prompts)
        self.accelerator.wait_for_everyone()

    def _images(self, data: TrainingData) -> None:
        def encode(pixels: Tensor) -> Tensor:
            self.family.load_vae()  # only when an image is missing; does nothing the second time
            return self.family.encode_images(pixels)

        started_s = time.perf_counter()
        encoded = data.cache_latents(
            encode,
            identity=self.family.vae_identity,
            batch_size=self.config.precision.vae_batch_size,
            on_progress=self._watch("images"),
            shard=self._shard,
        )
        self.family.unload_vae()
        self._say(encoded, "images", seconds=time.perf_counter() - started_s)

    def _texts(self, data: TrainingData, prompts: Sequence[str]) -> None:
        def encode(texts: Sequence[str]) -> list[TextEmbeds]:
            self.preemption.check("encoding captions")
            self.family.load_text_encoders()
            return self.family.encode_prompts(texts)

        started_s = time.perf_counter()
        encoded = data.cache_text(
            encode,
            identity=self.family.text_identity,
            batch_size=self.config.data.text_encoder_batch_size,
            extra=prompts,
            shard=self._shard,
        )
        self.family.unload_text_encoders()
        self._say(encoded, "captions and prompts", seconds=time.perf_counter() - started_s)

    @property
    def _shard(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _watch(self, what: str) -> Callable[[int, int], None]:
        """Stops at a signal, and says now and then how far the encoding is."""
        next_line_s = time.monotonic() + SECONDS_BETWEEN_LINES

        def on_progress(done: int, total: int) -> None:
            nonlocal next_line_s
            self.preemption.check(f"encoding {what}")
            if time.monotonic() >= next_line_s:
                next_line_s = time.monotonic() + SECONDS_BETWEEN_LINES
                logger.info("Encoded %d of %d %s.", done, total, what)

        return on_progress

    def _say(self, encoded: int, what: str, *, seconds: float) -> None:
        if encoded:
            logger.info("Encoded %d %s in %.1f s.", encoded, what, seconds)
        else:
            logger.info("All %s were encoded before.", what)
