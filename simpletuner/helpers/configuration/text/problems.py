"""Problems of a configuration: their wording, and the message that lists them by file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches

from pydantic import JsonValue
from pydantic_core import ErrorDetails

from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import redacted

_LONGEST_SHOWN = 60
_WIDEST_KEY = 40
# Of difflib's ratio: one letter of four wrong in a word, one of twenty in a name without separators.
_SAME_WORD = 0.75
_SAME_NAME = 0.95

_LIMITS = {
    "greater_than_equal": ("ge", "must be at least"),
    "greater_than": ("gt", "must be above"),
    "less_than_equal": ("le", "must be at most"),
    "less_than": ("lt", "must be below"),
}
_TYPE_MESSAGES = (
    (("int_",), "must be a whole number."),
    (("float_",), "must be a number."),
    (("finite_",), "must be finite."),
    (("bool_",), "must be true or false."),
    (("string_",), "must be a text."),
    (("tuple_", "list_", "iterable_"), "must be a list."),
    (("dict_", "mapping_", "model_"), "must be an object, {...}."),
    (("extra_",), "unknown key."),
)


class Problems:
    """Collects problems by file."""

    def __init__(self) -> None:
        self._by_source: dict[str, dict[tuple[str, str], None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_source.values()))

    def add(self, source: str, key: str, text: str) -> None:
        """Note a problem of a key; a repeated problem counts once."""
        self._by_source.setdefault(source, {})[key, text] = None

    def message(self) -> str:
        """One line per problem, below a heading per file."""
        lines: list[str] = []
        for source, problems in self._by_source.items():
            width = min(max(len(key) for key, _ in problems), _WIDEST_KEY)
            lines.append(f"{source}: {len(problems)} problem{'s' if len(problems) != 1 else ''}")
            lines += [
                f"  {printable(key):<{width}}  {text}" if key else f"  {text}" for key, text in problems
            ]
        return redacted("\n".join(lines))

    def raise_if_any(self) -> None:
        """Raise if there is any problem.

        Raises:
            ConfigError: Lists every problem.
        """
        if self._by_source:
            raise ConfigError(self.message())


def shown(value: object) -> str:
    """The value as shortened JSON on one line, redacted before it is cut."""
    try:
        text = redacted(json.dumps(value, ensure_ascii=False, default=str))
    except (ValueError, RecursionError):
        text = "..."
    text = printable(text)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 4]} ..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint at the known name that a misspelling means, after a space; empty if there is none.

    Names that only share a word or some letters mean different things. So each word must agree but for a
    typo, or the name lacks one word of a single known name and has two or more of its words.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    words = _words(name)
    misspelt = [each for each in by_lower if _is_misspelling(words, _words(each))]
    longer = [each for each in by_lower if _lacks_one_word(words, _words(each))]
    match = get_close_matches(name.lower(), misspelt, n=1, cutoff=0) or (longer if len(longer) == 1 else [])
    return f" Did you mean {by_lower[match[0]]}?" if match else ""


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


def _is_misspelling(words: list[str], other: list[str]) -> bool:
    if _ratio("".join(words), "".join(other)) >= _SAME_NAME:  # a separator more or less
        return True
    return len(words) == len(other) and all(map(_is_same_word, words, other))


def _lacks_one_word(words: list[str], other: list[str]) -> bool:
    # A key of validation images is no remedy for one of training.
    if len(other) != len(words) + 1 or len(words) < 2 or ("validation" in other) != ("validation" in words):
        return False
    return any(all(map(_is_same_word, words, other[:gap] + other[gap + 1 :])) for gap in range(len(other)))


def _is_same_word(word: str, other: str) -> bool:
    return sorted(word) == sorted(other) or _ratio(word, other) >= _SAME_WORD


def _ratio(text: str, other: str) -> float:
    return SequenceMatcher(None, text, other).ratio()


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The message for an unknown key, with a hint at the closest known one."""
    return f"unknown key.{nearest(printable(name).lstrip('-'), known)}"


def describe(error: ErrorDetails, *, show: Callable[[JsonValue], str]) -> tuple[str, str]:
    """(key, message) of a pydantic error; `show` turns the invalid value into text."""
    key = _dotted(error["loc"])
    context = error.get("ctx", {})
    error_type = error["type"]
    if error_type == "contradiction":
        return ".".join(filter(None, (key, str(context["key"])))), str(context["text"])
    if error_type == "missing":
        return key, "required, but missing."
    return key, f"{show(error['input'])}: {_reason(error_type, context, error)}"


def _reason(error_type: str, context: Mapping[str, object], error: ErrorDetails) -> str:
    if error_type in _LIMITS:
        name, wording = _LIMITS[error_type]
        return f"{wording} {context[name]:g}."
    if error_type == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        found = error["input"]
        hint = nearest(found, allowed) if isinstance(found, str) and len(allowed) > 1 else ""
        return f"must be {'' if len(allowed) == 1 else 'one of '}{', '.join(allowed)}.{hint}"
    if error_type == "value_error":
        return str(context["error"])
    if error_type == "none_required":
        return "must be null."
    texts = (text for starts, text in _TYPE_MESSAGES if error_type.startswith(starts))
    return next(texts, f"{error['msg']}.")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
