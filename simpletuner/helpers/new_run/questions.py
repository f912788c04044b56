"""The questions of `simpletuner init`: each answer is an option's value, or is asked for in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from simpletuner.helpers.errors import ConfigError, SimpleTunerError
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.io.names import file_name
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.new_run.answers import (
    Answers,
    choice_of,
    images_in,
    memory_of,
    model_of,
    name_of,
    trigger_of,
)
from simpletuner.helpers.new_run.card import find_card
from simpletuner.helpers.new_run.presets import (
    CARDS,
    NO_CARD,
    PURPOSES,
    Model,
    Purpose,
    fitting,
    models,
    num_steps,
    times,
)
from simpletuner.helpers.new_run.summary import run_of
from simpletuner.helpers.new_run.texts import Texts
from simpletuner.helpers.new_run.timing import minutes_on

T = TypeVar("T")
USUAL = "usual"


@dataclass(frozen=True, slots=True)
class Terminal:
    """Somebody who can be asked."""

    say: Callable[[str], None]
    ask: Callable[[str, str | None], str]
    """(question, default) -> answer."""


class Questions:
    """Reads the options and asks for the others."""

    def __init__(self, options: Mapping[str, str | None], texts: Texts, terminal: Terminal | None) -> None:
        """Build from the value of each option; without a terminal nobody is asked."""
        self.options, self.texts, self.terminal = options, texts, terminal
        self.card_name: str | None = None
        self.purpose_of = partial(choice_of, choices=PURPOSES, texts=texts)
        self.time_of = partial(choice_of, choices=times(), texts=texts)

    def answers(self) -> Answers:
        """All answers.

        Raises:
            ConfigError: An option's value is wrong, or nobody can be asked for one that is missing.
            DataError: The folder of images cannot be listed.
        """
        texts = self.texts
        known = self._known_memory()
        self._refuse_missing(needs_memory=known is None)
        self._refuse_wrong(known)
        if None in self.options.values():
            self._say(texts("intro"))
        images = self._answer("images", partial(images_in, texts=texts))
        chosen = self._answer("purpose", self.purpose_of, default=PURPOSES[0])
        purpose = next(each for each in PURPOSES if each == chosen)
        trigger = self._answer("trigger", partial(trigger_of, texts=texts), question=f"ask_trigger_{purpose}")
        memory = (
            self._answer("memory", partial(memory_of, texts=texts), default="0") if known is None else known
        )
        model, card = self._answer(
            "model", partial(model_of, memory=memory, texts=texts), default=self._offered(memory)
        )
        choices = ", ".join(self._lengths(model, purpose, card, num_images=images.count))
        time = self._answer("time", self.time_of, default=USUAL, choices=choices)
        suggested = file_name(images.folder.resolve().name)
        name = self._answer("name", partial(name_of, texts=texts), default=suggested)
        return Answers(
            images=images,
            purpose=purpose,
            trigger=trigger,
            model=model,
            memory=memory,
            card=card,
            card_name=self.card_name,
            time=time,
            name=name,
        )

    def _lengths(self, model: Model, purpose: Purpose, card: int, *, num_images: int) -> Iterator[str]:
        """Each length of training with its steps, and its minutes on a card that is known."""
        found = estimate(run_of(model, purpose, card, specs=specs())) if self.card_name else None
        for name in times():
            steps = num_steps(model.purposes[purpose], num_images=num_images, time=name)
            minutes = minutes_on(self.card_name, found, steps=steps)
            key = "time_choice" if minutes is None else "time_choice_minutes"
            yield self.texts(key, name=name, steps=steps, minutes=minutes)

    def _known_memory(self) -> float | None:
        """Memory of the card in GB: --memory, 0 for a model that needs none, or the card's; else None."""
        given, named = self.options["memory"], self.options["model"]
        if given is not None:
            return memory_of(given, self.texts)
        if named is not None and models()[choice_of(named, models(), self.texts)].smallest == NO_CARD:
            return NO_CARD
        card = find_card()
        if card is None:
            return None
        self.card_name = card.name
        self._say(self.texts("found_card", card=card.name, memory=f"{card.memory:.1f}"))
        return card.memory

    def _refuse_missing(self, *, needs_memory: bool) -> None:
        required = ["images", "purpose", "trigger", "model", *(["memory"] if needs_memory else [])]
        missing = [f"--{key}" for key in required if self.options[key] is None]
        if missing and self.terminal is None:
            raise ConfigError(self.texts("missing", options=", ".join(missing)))

    def _refuse_wrong(self, memory: float | None) -> None:
        """Read the options whose questions come late, before the others are answered for nothing."""
        readers: dict[str, Callable[[str], object]] = {
            "purpose": self.purpose_of,
            "trigger": partial(trigger_of, texts=self.texts),
            "time": self.time_of,
            "name": partial(name_of, texts=self.texts),
        }
        if memory is not None:
            readers["model"] = partial(model_of, memory=memory, texts=self.texts)
        for key, read in readers.items():
            given = self.options[key]
            if given is not None:
                read(given)

    def _offered(self, memory: float) -> str:
        """Show the models that fit, unless one is given. Returns the smallest that needs a card, if any."""
        fit = fitting(memory)
        if all(each.smallest == NO_CARD for each in fit):
            self._say(self.texts("only_without_card", memory=f"{memory:g}", smallest=min(CARDS)))
        if self.options["model"] is None:
            self._say(self.texts("models"))
            for number, model in enumerate(models().values(), start=1):
                if model in fit:
                    self._say(f"  {number}  {model.name:<12}{model.title}")
        return next((each for each in fit if each.smallest != NO_CARD), fit[0]).name

    def _answer(
        self,
        key: str,
        read: Callable[[str], T],
        *,
        default: str | None = None,
        question: str | None = None,
        choices: str = "",
    ) -> T:
        """What `read` makes of the option, else of the answer in a terminal, else of the default."""
        given = self.options[key]
        if given is None and self.terminal is None:
            given = default
        if given is not None:
            return read(given)
        assert self.terminal is not None, "options without a default are required where nobody can be asked"
        while True:
            text = self.terminal.ask(self.texts(question or f"ask_{key}", choices=choices), default)
            try:
                return read(text)
            except SimpleTunerError as error:
                self.terminal.say(str(error))

    def _say(self, line: str) -> None:
        if self.terminal is not None:
            self.terminal.say(line)
