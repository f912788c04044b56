"""The answers that a configuration is made of, each checked for itself. Errors are in the user's language."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from simpletuner.helpers.choices.image_files import image_suffixes
from simpletuner.helpers.data.captions import text_files_beside, text_in
from simpletuner.helpers.data.sources.base import Scan, scan_source
from simpletuner.helpers.data.sources.local import LocalFolder
from simpletuner.helpers.errors import ConfigError, DataError
from simpletuner.helpers.io.names import file_name, printable
from simpletuner.helpers.io.paths import portable
from simpletuner.helpers.new_run.presets import Model, Purpose, PurposeSettings, fitting, models, num_steps
from simpletuner.helpers.new_run.texts import Texts

CONFIGURATIONS, RUNS = Path("config"), Path("output")
LONGEST_TRIGGER = 60
DEMO = "default"
"""`./train.sh default` trains config/config.json."""


@dataclass(frozen=True, slots=True)
class Images:
    """A folder of images, as far as its file names tell."""

    folder: Path
    count: int
    num_below: int
    """Of them in subfolders."""
    captions: tuple[str, ...]
    """Texts beside images, one for each image that has some and can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All answers, and the card's settings that follow."""

    images: Images
    purpose: Purpose
    trigger: str
    model: Model
    memory: float
    """Of the card in GB; 0 without one."""
    card: int
    """Memory by which the model's settings for this card are named."""
    card_name: str | None = None
    """Of the card that was found."""
    time: str
    name: str

    @property
    def preset(self) -> PurposeSettings:
        """How the model is trained for this purpose."""
        return self.model.purposes[self.purpose]

    @property
    def folder(self) -> Path:
        """Of the new configuration."""
        return CONFIGURATIONS / self.name

    @property
    def output(self) -> Path:
        """Of the run."""
        return RUNS / self.name

    @property
    def caption(self) -> str:
        """Of images without a text file."""
        return self.preset.caption.format(trigger=self.trigger)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return num_steps(self.preset, num_images=self.images.count, time=self.time)


def images_in(text: str, texts: Texts) -> Images:
    """The images in a folder and its subfolders.

    Raises:
        ConfigError: There is no such folder, or no image that can be read here in it.
        DataError: The folder cannot be listed.
    """
    try:
        folder = portable(Path(text.strip()).expanduser())
        is_folder, is_file = folder.is_dir(), folder.is_file()
        is_above = Path.cwd().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a name too long, an unknown user, no permission
        raise ConfigError(texts("no_folder", path=printable(text))) from error
    if not text.strip() or not is_folder:
        raise ConfigError(texts("no_folder_but_file" if is_file else "no_folder", path=printable(text)))
    if is_above or set("{}") & set(str(folder)):
        raise ConfigError(texts("folder_above" if is_above else "folder_with_braces", path=printable(text)))
    scan = scan_source(LocalFolder(folder))
    names = [file.name for file in scan.images]
    if not names and scan.unread:
        name, reason = scan.unread[0]
        raise ConfigError(texts("unread_images", path=folder, name=printable(name), reason=reason))
    if not names:
        count = len(scan.texts) + len(scan.others) + len(scan.skipped)
        suffixes = ", ".join(sorted(image_suffixes()))
        raise ConfigError(texts("no_images", path=folder, count=count, suffixes=suffixes))
    below = sum("/" in name for name in names)
    return Images(folder, len(names), below, tuple(_captions(scan)))


def _captions(scan: Scan) -> Iterator[str]:
    for image in scan.images:
        for file in text_files_beside(image, scan)[:1]:
            with suppress(DataError):  # the plan tells which cannot be read
                yield text_in(file)


def choice_of(text: str, choices: Iterable[str], texts: Texts) -> str:
    """One of the choices, by its name in any case, its number from 1 on, or an unmistakable beginning.

    Raises:
        ConfigError: It is none of them.
    """
    known, given = list(choices), text.strip().lower()
    by_number = dict(zip(map(str, range(1, len(known) + 1)), known, strict=True))
    begun = [each for each in known if given and each.startswith(given)]
    found = given if given in known else by_number.get(given)
    if found is None and len(begun) == 1:
        found = begun[0]
    if found is None:
        raise ConfigError(texts("no_choice", value=printable(text), choices=", ".join(known)))
    return found


def trigger_of(text: str, texts: Texts) -> str:
    """The words that the images are learnt under.

    Raises:
        ConfigError: They are empty, long, on several lines, or have braces or backticks.
    """
    trigger = text.strip()
    if not 0 < len(trigger) <= LONGEST_TRIGGER or not trigger.isprintable() or set("{}`") & set(trigger):
        raise ConfigError(texts("bad_trigger", value=printable(text)))
    return trigger


def memory_of(text: str, texts: Texts) -> float:
    """Memory of a card in GB.

    Raises:
        ConfigError: It is no number from 0 on.
    """
    try:
        memory = float(text.strip().lower().removesuffix("gb").removesuffix("gib"))
    except ValueError:
        memory = math.nan
    if not 0 <= memory < math.inf:
        raise ConfigError(texts("bad_memory", value=printable(text)))
    return memory


def model_of(name: str, memory: float, texts: Texts) -> tuple[Model, int]:
    """The model of a name, and the memory by which its settings for this card are named.

    Raises:
        ConfigError: It is unknown, or does not fit the card; the message names what does.
    """
    model = models()[choice_of(name, models(), texts)]
    card = model.card_for(memory)
    if card is None:
        others = ", ".join(each.name for each in fitting(memory))
        shown = f"{memory:g}"
        raise ConfigError(
            texts("too_small", title=model.title, memory=shown, smallest=model.smallest, fitting=others)
        )
    return model, card


def name_of(text: str, texts: Texts) -> str:
    """Name of a new configuration.

    Raises:
        ConfigError: It is no name of a folder, or there is a configuration or a run of this name.
    """
    name = text.strip()
    if name.lower() == DEMO:
        raise ConfigError(texts("name_of_the_demo", name=name))
    if not name or name != file_name(name):
        raise ConfigError(texts("bad_name", value=printable(text), suggested=file_name(name)))
    for folder in (CONFIGURATIONS / name, RUNS / name):
        if os.path.lexists(folder):
            raise ConfigError(texts("name_exists", folder=folder))
    return name
