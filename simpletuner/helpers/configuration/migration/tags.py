"""Shuffled and dropped tags of other programs as keys of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import number
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.io.names import counted

ORDERS = 4
"""Orders of a caption whose tags another program shuffles anew each time."""
SPLIT_ON = {",": "comma", " ": "space", ".": "period"}
"""Separator of tags -> value of split_on."""
DRAWN = (
    f"{counted(ORDERS, 'variant')} of each caption, in turn; each time another there. caption_variants and "
    "count raise the number."
)


_OURS = {
    "separator": "caption_shuffle: split_on",
    "num_kept": "caption_shuffle: position_start",
    "keep_separator": "caption_shuffle: keep_separator",
    "shuffles": "caption_shuffle: enable",
    "dropout": "caption_tag_dropout_rate",
}
"""Field of Tags -> our key."""


@dataclass(frozen=True, slots=True)
class Tags:
    """What another program does with the tags of captions."""

    separator: str
    num_kept: int
    """First tags that stay as they are."""
    shuffles: bool = False
    dropout: float = 0.0
    """Share of the other tags."""
    keep_separator: str = ""
    """Text that ends the tags which stay as they are."""

    def outcome(self, captions: Iterable[str] | None) -> tuple[Outcome, str]:
        """Whether it is taken over, and the reason if not; `captions` is None if they are not at hand."""
        if not self.shuffles and not self.dropout:
            return "no effect", "No tag is shuffled or dropped."
        if self.separator not in SPLIT_ON:
            known = " ".join(map(repr, SPLIT_ON))
            return "not translated", f"Tags end at one of {known} here. Change that in the captions."
        if captions is None or any(self._has_tags(caption) for caption in captions):
            return "translated", ""
        return "no effect", "No caption here has tags to change."

    def keys(self) -> dict[str, JsonValue]:
        """The keys of a dataset."""
        shuffle: dict[str, JsonValue] = {"enable": self.shuffles}
        if self.shuffles:
            shuffle |= {"count": ORDERS, "include_original": False}
        if self.separator != ",":
            shuffle["split_on"] = SPLIT_ON[self.separator]
        if self.num_kept:
            shuffle["position_start"] = self.num_kept
        if self.keep_separator:
            shuffle["keep_separator"] = self.keep_separator
        dropout: dict[str, JsonValue] = (
            {"caption_tag_dropout_rate": number(self.dropout)} if self.dropout else {}
        )
        return {"caption_shuffle": shuffle, **dropout}

    def _has_tags(self, caption: str) -> bool:
        """Whether a caption has tags that do not stay as they are."""
        parts = caption.split(self.keep_separator) if self.keep_separator else [caption]
        free = parts[1] if len(parts) > 1 else caption
        num_kept = 0 if len(parts) > 1 else self.num_kept
        return len([tag for tag in free.split(self.separator) if tag.strip()]) > max(num_kept, 1)


def put_tags(
    tags: Tags,
    entry: dict[str, JsonValue],
    *,
    captions: Iterable[str] | None,
    at: Callable[[str], Settings],
    names: Mapping[str, str],
) -> None:
    """Write the keys of a dataset, and note what became of the program's.

    Args:
        tags: What the program does.
        entry: Gets the keys.
        captions: The captions; None if they are not at hand.
        at: A key of the program -> where it stands.
        names: Field of `tags` -> key of the program.
    """
    outcome, reason = tags.outcome(captions)
    if outcome == "translated":
        entry |= tags.keys()
    for field, key in names.items():
        if at(key).has(key):
            is_drawn = outcome == "translated" and field in ("shuffles", "dropout") and at(key).flag(key)
            at(key).decide(
                key,
                "approximate" if is_drawn else outcome,
                ours=_OURS[field],
                text=DRAWN if is_drawn else reason,
            )


def first_line(file: Path) -> str:
    """The first line of a caption file that is not blank."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def share_dropout(draft: Draft) -> None:
    """Write the one rate of caption dropout of all datasets into config.json."""
    key = "caption_dropout_probability"
    rates = {str(each.get(key)): each.get(key) for each in draft.datasets}
    if len(rates) != 1:
        draft.config[key] = 0
        return
    draft.config[key] = next(iter(rates.values()))
    for each in draft.datasets:
        each.pop(key, None)
