"""Images of another run's adapter, shown beside those of this run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from simpletuner.helpers.adapters.files import adapter_file, embeddings
from simpletuner.helpers.adapters.files.text_layers import encoders_in
from simpletuner.helpers.checkpointing.weight_identity import weight_hashes
from simpletuner.helpers.errors import TrainingError
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import ADAPTER_FILE, EMBEDDING_FILE, embedding_file
from simpletuner.helpers.sampling.attached import InText, attach_in_text, attached

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.adapters.files.adapter_file import AdapterFile
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.sampling.prompts import PromptSpec
    from simpletuner.helpers.sampling.validation_sampler import ValidationSampler


def build_comparison(config: RunConfig, sampler: ValidationSampler) -> Comparison | None:
    """The comparison that validation_compared_config asks for; None without that key or without prompts.

    Raises:
        TrainingError: The adapter file of the other run is missing or unreadable.
    """
    other = config.compared_with
    if other is None or not sampler.prompts:
        return None
    token, folder = other.new_tokens.placeholder_token, other.checkpoint.output_dir
    files = [*([] if token is None else [folder / EMBEDDING_FILE])]
    if other.model.has_adapter:
        files.insert(0, folder / ADAPTER_FILE)
    try:
        digest = xxhash.xxh3_64_hexdigest(b"".join(file.read_bytes() for file in files))
    except OSError as error:
        raise TrainingError(
            f"{error.filename}: cannot read the adapter of validation_compared_config {other.source} "
            f"({error.strerror}). Copy it from that run's last checkpoint, or train it in another output_dir."
        ) from error
    name = other.algorithm.title
    title = name if name != config.algorithm.title else f"{name} of {folder.name}"
    return Comparison(title=redacted(title), adapter=files[0], token=token, digest=digest, sampler=sampler)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Generates the images of another run's adapter once, before this run's adapter is attached."""

    title: str
    """Title of their column in the grid."""
    adapter: Path
    """Adapter file of the other run, or the file of its new token alone."""
    token: str | None
    """New token of the other run, whose file is beside the adapter."""
    digest: str
    """Hash of these files."""
    sampler: ValidationSampler

    def cached_path(self, prompt: PromptSpec) -> Path:
        """Cache path of the other adapter's image of a prompt."""
        return self.sampler.cached_path(prompt, self.digest, prompt.strength)

    def generate_missing(self, denoiser: nn.Module) -> None:
        """Generate the images that are not cached, with a denoiser that carries no adapter.

        Raises:
            TrainingError: The other adapter changed the denoiser's weights.
        """
        files = {prompt: self.cached_path(prompt) for prompt in self.sampler.prompts}
        missing = {prompt: file for prompt, file in files.items() if not file.exists()}
        if not missing:
            return
        before = weight_hashes(denoiser)
        with self.sampler.best_effort(f"the images of {self.adapter}"), self.sampler.eval_mode(denoiser):
            pipeline = self.sampler.make_pipeline(denoiser)
            stored = adapter_file.read(self.adapter, takes_embeddings=True)
            with (
                self._text_encoders(stored) as (sampler, in_text),
                attached(pipeline, stored, encoders=[*in_text.loras]) as set_strength,
            ):

                def prepare(prompt: PromptSpec) -> None:
                    set_strength(prompt.strength)
                    in_text.set_strength(prompt.strength)

                sampler.generate_all(pipeline, missing, prepare=prepare)
        if weight_hashes(denoiser) != before:
            raise TrainingError(
                f"{self.adapter} changed the base weights while its images were generated. Start again with "
                "another validation_compared_config, or without one."
            )

    @contextmanager
    def _text_encoders(self, stored: AdapterFile) -> Iterator[tuple[ValidationSampler, InText]]:
        """The sampler with the text encoders of the other run, and what is attached to them."""
        family = self.sampler.family
        if not encoders_in(stored) and self.token is None:
            yield self.sampler, InText()
            return
        family.unload_text_encoders()  # a token that is added to their tokenizers stays there
        family.load_text_encoders()
        files = [] if self.token is None else [embedding_file(self.adapter)]
        try:
            tokens = [embeddings.read(file, token=self.token) for file in files]
            in_text = attach_in_text(family, stored, tokens)
            sampler = replace(self.sampler, text_embeds=lambda text: family.encode_prompts([text])[0])
            yield sampler, in_text
        finally:
            family.unload_text_encoders()
