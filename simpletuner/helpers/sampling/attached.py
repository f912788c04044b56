"""Adapters and new tokens on a loaded model, for the time of some images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simpletuner.helpers.adapters.files.embeddings import is_embeddings
from simpletuner.helpers.adapters.files.foreign.translation import (
    ScheduleOptions,
    read_parts,
    stated_schedule,
)
from simpletuner.helpers.adapters.files.text_layers import without_encoders
from simpletuner.helpers.adapters.inference import (
    attach_to_encoders,
    attach_to_pipeline,
    is_read_by_diffusers,
    load_peft_into_pipeline,
    remove_from_pipeline,
)
from simpletuner.helpers.adapters.new_tokens import TokenEmbedding, attach_embeddings
from simpletuner.helpers.sampling.embeddings import text_parts

if TYPE_CHECKING:
    from simpletuner.helpers.adapters.files.adapter_file import AdapterFile
    from simpletuner.helpers.adapters.files.embeddings import Embeddings
    from simpletuner.helpers.adapters.network import LycorisAdapter
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.models.family import ModelFamily


@dataclass(frozen=True, slots=True)
class InText:
    """Adapters and new tokens on the text encoders."""

    loras: Mapping[str, LycorisAdapter] = field(default_factory=dict)
    """By the name of the text encoder."""
    tokens: Sequence[TokenEmbedding] = ()

    def set_strength(self, strength: float) -> None:
        """Scale all of it."""
        for lora in self.loras.values():
            lora.set_strength(strength)
        for token in self.tokens:
            token.set_strength(strength)


def attach_in_text(family: ModelFamily, stored: AdapterFile | None, tokens: Sequence[Embeddings]) -> InText:
    """Attach a file's layers of the loaded text encoders and new tokens, which stay in the tokenizers.

    Raises:
        AdapterError: They do not fit the text encoders.
    """
    loras = {} if stored is None else attach_to_encoders(stored, family.text_encoders)
    parts = text_parts(family) if tokens else {}
    return InText(loras, [token for each in tokens for token in attach_embeddings(parts, each)])


def encode(
    family: ModelFamily, in_text: InText, texts: Collection[str], *, strengths: Collection[float]
) -> dict[float, dict[str, TextEmbeds]]:
    """Strength of what is attached to the text encoders -> text -> its embeds."""
    texts = sorted(texts)

    def encoded() -> dict[str, TextEmbeds]:
        return dict(zip(texts, family.encode_prompts(texts), strict=True))

    if not in_text.loras and not in_text.tokens:
        return dict.fromkeys(strengths, encoded())
    found = {}
    for strength in strengths:
        in_text.set_strength(strength)
        found[strength] = encoded()
    return found


@contextmanager
def attached(
    pipeline: Any,
    stored: AdapterFile | None,
    *,
    encoders: Collection[str] = (),
    schedule: ScheduleOptions | None = None,
) -> Iterator[Callable[[float], None]]:
    """Attach a file's layers of the denoiser to a pipeline; yields the function that sets their strength.

    Args:
        pipeline: Without text encoders.
        stored: The file; nothing is attached for None and for a file of a new token.
        encoders: Text encoders that have their layers already.
        schedule: Values that replace those of the file's rank schedule.

    Raises:
        AdapterError: The file is unreadable or does not fit the model.
    """
    if stored is None or is_embeddings(stored):
        yield lambda _: None
    elif is_read_by_diffusers(stored) and not schedule:
        name = load_peft_into_pipeline(pipeline, stored.path)
        try:
            yield lambda strength: pipeline.set_adapters(name, strength)
        finally:
            pipeline.unload_lora_weights()
    else:
        adapter = attach_to_pipeline(pipeline, without_encoders(stored, encoders), schedule=schedule)
        try:
            yield adapter.set_strength
        finally:
            remove_from_pipeline(pipeline, adapter)


def open_ranks(stored: AdapterFile) -> dict[str, int] | None:
    """The values of a rank schedule that keeps every rank of a file active; None for one without T-LoRA.

    Raises:
        AdapterError: The file's schedule is invalid.
    """
    found = read_parts(stored).found
    schedule = stated_schedule(stored) if found is None else found.schedule
    return None if schedule is None else {"min_rank": schedule.max_rank}
