"""The images of a comparison from one base model, which is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from simpletuner.helpers.adapters.files.text_layers import encoders_in
from simpletuner.helpers.errors import AdapterError, ConfigError, ModelError
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import embedding_file
from simpletuner.helpers.sampling.attached import InText, attach_in_text, attached, encode, open_ranks
from simpletuner.helpers.sampling.generating import description, generate
from simpletuner.helpers.sampling.images import save_png
from simpletuner.helpers.sampling.prompts import PromptSpec, expand_prompts, pipeline_type
from simpletuner.helpers.sampling.references import with_references
from simpletuner.helpers.sampling.sample_command import (
    Opened,
    SampleRequest,
    Sections,
    load_denoiser,
    make_family,
    open_adapter,
)

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.helpers.configuration.schema.sections import ValidationConfig
    from simpletuner.helpers.contracts import TextEmbeds
    from simpletuner.helpers.sampling.contenders import Contender

logger = logging.getLogger(__name__)

BASE = "base model"
IMAGES_FOLDER = "images"


@dataclass(frozen=True, slots=True)
class Variant:
    """How the weights of a contender are used."""

    strength: float = 1.0
    is_open: bool = False
    """All ranks are active at every timestep."""

    @property
    def details(self) -> str:
        """In words; "" as trained."""
        strength = "" if self.strength == 1 else f"strength {self.strength:g}"
        return ", ".join(filter(None, (strength, "all ranks open" if self.is_open else "")))


@dataclass(kw_only=True)
class Shown:
    """A contender, or the base model, and what became of it."""

    contender: Contender | None
    """None for the base model."""
    sections: Sections
    header: Mapping[str, str]
    """Of its file."""
    variants: tuple[Variant, ...] = (Variant(),)
    is_whole: bool = False
    images: dict[Variant, dict[str, Path]] = field(default_factory=dict)
    """Variant -> name of a prompt -> file."""
    problem: str | None = None

    @property
    def title(self) -> str:
        """Of its columns."""
        return BASE if self.contender is None else self.contender.title

    def fail(self, error: Exception) -> None:
        """Keep the reason why images are missing."""
        self.problem = redacted(str(error))
        logger.warning("%s: %s", self.title, self.problem)


class LoadedOnce:
    """The contenders on one denoiser, and the images that they lack."""

    def __init__(
        self, members: Sequence[Shown], *, options: SampleRequest, config: ValidationConfig, folder: Path
    ) -> None:
        """Find the model's components, and the images that exist.

        Args:
            members: At least one; their sections have the same model and precision.
            options: What holds for every image.
            config: Settings of the images.
            folder: Of the images.

        Raises:
            ModelError: The base model is missing.
            DataError: A reference image cannot be used.
        """
        self.members, self.options, self.config, self.folder = members, options, config, folder
        self.family = make_family(members[0].sections, dtype=options.dtype)
        self.prompts = with_references(
            expand_prompts(config, seed=0, seeds=options.seeds),
            alignment=self.family.spec.pixel_alignment,
            fills_image=False,
        )
        self._plain: dict[str, TextEmbeds] = {}
        for each in members:
            self._name_images(each)

    @property
    def num_missing(self) -> int:
        """Number of images to generate."""
        return sum(len(self._missing(each)) for each in self.members)

    def generate(self, on_image: Callable[[float], None]) -> None:
        """Generate the missing images; `on_image` gets how many are done, with the share of the present one.

        Raises:
            ModelError: The base model does not load.
            StorageError: An image cannot be written.
        """
        members = [each for each in self.members if self._missing(each)]
        if not members:
            return
        encoded: list[tuple[Shown, _Encoded]] = []
        for member in members:
            with _named_failure(member):
                encoded.append((member, self._encoded(member)))
        self.family.unload_text_encoders()
        denoiser = load_denoiser(self.family, self.members[0].sections)
        done = 0
        for member, texts in encoded:
            missing = self._missing(member)
            with _named_failure(member):
                for share in self._images(denoiser, member, texts):
                    on_image(done + share)
            done += len(missing)
            on_image(done)

    def _images(self, denoiser: nn.Module, member: Shown, texts: _Encoded) -> Iterator[float]:
        """Generate the missing images of a contender; yields how many are done, in steps of a whole one.

        Raises:
            AdapterError: The file is gone or does not fit.
        """
        # Training's noise settings, which runs may differ in, hold the shift of the sampling schedule.
        is_same = member.sections.noise == self.members[0].sections.noise
        family = self.family if is_same else make_family(member.sections, dtype=self.options.dtype)
        kind, scheduler = pipeline_type(self.prompts), self.config.validation_noise_scheduler
        pipeline = family.make_pipeline(denoiser, kind, scheduler=scheduler)
        opened = self._opened(member)
        stored = None if opened is None else opened.stored
        negative, done = self.config.validation_negative_prompt, 0
        for is_open in (False, True):
            cells = [each for each in self._missing(member) if each[0].is_open == is_open]
            if not cells:
                continue
            schedule = open_ranks(stored) if is_open and stored is not None else self.options.schedule
            with attached(pipeline, stored, encoders=texts.encoders, schedule=schedule) as set_strength:
                for variant, prompt, file in cells:
                    set_strength(variant.strength)
                    own = texts.embeds[variant.strength]
                    image = generate(
                        family,
                        pipeline,
                        prompt,
                        texts=(own[prompt.text], own[negative]),
                        config=self.config,
                    )
                    save_png(image, file, parameters=self._description(member, prompt, variant))
                    done += 1
                    yield done
        if not is_same:
            family.unload_vae()

    def _encoded(self, member: Shown) -> _Encoded:
        """The embeds of every prompt at every strength of a contender.

        Raises:
            AdapterError: The file is gone or does not fit.
        """
        opened, family = self._opened(member), self.family
        texts = {prompt.text for prompt in self.prompts} | {self.config.validation_negative_prompt}
        strengths = {variant.strength for variant in member.variants}
        if opened is None or not (opened.tokens or (opened.stored and encoders_in(opened.stored))):
            if not self._plain:
                family.load_text_encoders()
                self._plain = encode(family, InText(), texts, strengths={1.0})[1.0]
            return _Encoded(dict.fromkeys(strengths, self._plain))
        family.unload_text_encoders()  # a token that is added to their tokenizers stays there
        family.load_text_encoders()
        try:
            in_text = attach_in_text(family, opened.stored, opened.tokens)
            return _Encoded(encode(family, in_text, texts, strengths=strengths), [*in_text.loras])
        finally:
            family.unload_text_encoders()

    def _opened(self, member: Shown) -> Opened | None:
        """The content of a contender's file; None for the base model."""
        if member.contender is None:
            return None
        return open_adapter(replace(self.options, adapter=member.contender.file))

    def _missing(self, member: Shown) -> list[tuple[Variant, PromptSpec, Path]]:
        if member.problem is not None:
            return []
        return [
            (variant, prompt, files[prompt.name])
            for variant, files in member.images.items()
            for prompt in self.prompts
            if not files[prompt.name].is_file()
        ]

    def _name_images(self, member: Shown) -> None:
        """Name the file of each image by a hash of all that it depends on."""
        components = self.family.components
        depends_on: list[object] = [member.sections.model, member.sections.noise, member.sections.precision]
        depends_on += [self.options.dtype, self.options.schedule, *self.options.embeddings]
        depends_on += [_signature(components.denoiser.files), _signature(components.vae.files)]
        config = self.config.model_copy(update={"prompts": (), "validation_resolution": ()})
        if member.contender is not None:
            file = member.contender.file
            depends_on.append(_signature([*file.glob("*"), file, embedding_file(file)]))
        for variant in member.variants:
            member.images[variant] = {}
            for prompt in self.prompts:
                text = repr((depends_on, config, variant, prompt))
                digest = xxhash.xxh3_64_hexdigest(text.encode())
                member.images[variant][prompt.name] = self.folder / f"{prompt.name}-{digest}.png"

    def _description(self, member: Shown, prompt: PromptSpec, variant: Variant) -> str:
        return description(
            prompt,
            self.config,
            model=Path(member.sections.model.pretrained_model_name_or_path).name,
            adapter=None if member.contender is None else member.title,
            adapter_strength=f"{variant.strength:g}",
            rank_schedule="all ranks open" if variant.is_open else None,
        )


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The embeds of a contender."""

    embeds: Mapping[float, Mapping[str, TextEmbeds]]
    """Strength -> text -> embeds."""
    encoders: Sequence[str] = ()
    """Text encoders whose layers of the file are in them."""


@contextmanager
def _named_failure(member: Shown) -> Iterator[None]:
    """Keep the reason why a contender has no images, and go on; a disk that is full ends everything."""
    try:
        yield
    except (AdapterError, ConfigError, ModelError) as error:
        member.fail(error)


def _signature(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file that exists."""
    states = ((file.name, file.stat()) for file in files if file.exists())
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
