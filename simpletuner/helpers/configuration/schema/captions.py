"""Changes of captions: filters, and the order of tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ValidationInfo

from simpletuner.helpers.configuration.schema.base import (
    Count,
    CountOrZero,
    OptionalSeed,
    OptionalText,
    Section,
    input_file,
)
from simpletuner.helpers.configuration.schema.values import is_off

_UNESCAPED_SLASH = re.compile(r"(?<!\\)/")
_LARGEST_FILE_BYTES = 1 << 20


class CaptionShuffle(Section):
    """The tags of captions: where they end, which stay in place, and the orders of the others."""

    enable: bool = False
    """Shuffle the tags. Without it the other keys only say which tags caption_tag_dropout_rate may drop."""
    count: Count = 1
    """Shuffled orders of each caption."""
    seed: OptionalSeed = None
    """Seed of the orders; null is the run's."""
    split_on: Literal["comma", "space", "period"] = "comma"
    """What separates tags. A period counts before a blank and at the end."""
    position_start: CountOrZero = 0
    """Number of first tags that stay in place."""
    keep_separator: OptionalText = None
    """Text, for instance |||, that ends the tags which stay in place, instead of position_start; tags after a
    second one stay too. It is removed from the caption. null for none."""
    include_original: bool = True
    """The caption's own order is one more."""

    @property
    def num_orders(self) -> int:
        """Orders of each caption, its own included if it is one."""
        return self.count + self.include_original if self.enable else 1


@dataclass(frozen=True, slots=True)
class CaptionFilter:
    """An entry of caption_filter_list."""

    pattern: re.Pattern[str]
    replacement: str = ""
    """As re.sub takes it: \\1 is the first group."""

    def apply(self, caption: str) -> str:
        """The caption without what the entry removes; a change leaves no double blanks."""
        changed = self.pattern.sub(self.replacement, caption)
        return caption if changed == caption else re.sub(r"  +", " ", changed).strip()


def caption_filter(entry: str) -> CaptionFilter:
    r"""An entry as a filter: s/a/b/ replaces a, another is a regular expression and removes.

    A term without special characters is the expression of itself. A slash inside is written \/.

    Raises:
        ValueError: It is empty or no regular expression; the message names the place.
    """
    parts = _UNESCAPED_SLASH.split(entry)
    replaces = parts[0] == "s" and len(parts) > 2
    if replaces and (len(parts) > 4 or (len(parts) == 4 and parts[3].strip() not in ("", "g"))):
        raise ValueError(r"must be s/search/replacement/, with \/ for a slash inside.")
    search = parts[1] if replaces else entry
    replacement = parts[2].replace(r"\/", "/") if replaces else ""
    if not search:
        raise ValueError("is empty. Remove it.")
    try:
        pattern = re.compile(search)
        pattern.sub(replacement, "")  # refuses groups that the expression lacks
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + (3 if replaces else 1)}"
        raise ValueError(
            f"is no regular expression: {error.msg}{place}. Write \\ before a character that stands for "
            "itself."
        ) from error
    return CaptionFilter(pattern, replacement)


def _entries(value: object, info: ValidationInfo) -> tuple[str, ...]:
    """The entries of a list, or of a .txt or .json file.

    Raises:
        ValueError: The file cannot be read, or entries are no filters; the message lists all of them.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    entries = _of_file(input_file(value, info)) if isinstance(value, str | Path) else value
    if not isinstance(entries, Sequence) or not all(isinstance(each, str) for each in entries):
        raise ValueError("must be a list of texts, or the path of a .txt or .json file with one.")
    problems = []
    for number, entry in enumerate(entries, start=1):
        try:
            caption_filter(entry)
        except ValueError as error:
            problems.append(f"entry {number}, {entry!r}, {error}")
    if problems:
        raise ValueError(" ".join(problems))
    return tuple(entries)


def _of_file(path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".json"):
        raise ValueError(
            "must be a list, or the path of a .txt file with an entry on each line or a .json array."
        )
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise ValueError(f"is larger than {_LARGEST_FILE_BYTES >> 20} MiB. Check the path.")
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"is no JSON: {error.msg} at {place}. Correct it.") from error


CaptionFilters = Annotated[tuple[str, ...], BeforeValidator(_entries)]


def _texts(value: object) -> object:
    """The captions of reference images as a list: of a text; empty for false."""
    if is_off(value):
        return ()
    return [value] if isinstance(value, str) else value


ReferenceCaptions = Annotated[tuple[str, ...], BeforeValidator(_texts)]
