"""Captions of kohya's scripts, and what they do with them, as keys of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.choices.captions import text_suffixes
from simpletuner.helpers.configuration.migration.adapters import number
from simpletuner.helpers.configuration.migration.draft import Settings
from simpletuner.helpers.configuration.migration.tags import DRAWN, Tags, first_line, put_tags
from simpletuner.helpers.configuration.text.decisions import Outcome
from simpletuner.helpers.io.names import counted

_TAG_KEYS = {
    "shuffles": "shuffle_caption",
    "num_kept": "keep_tokens",
    "keep_separator": "keep_tokens_separator",
    "separator": "caption_separator",
    "dropout": "caption_tag_dropout_rate",
}


@dataclass(slots=True)
class Levels:
    """The places where a subset's key may stand, the nearest first; the command is the last."""

    places: list[Settings]

    def at(self, key: str) -> Settings:
        """The nearest place that gives a key; the command's defaults for none."""
        return next((place for place in self.places if place.has(key)), self.places[-1])


def put_captions(levels: Levels, entry: dict[str, JsonValue], images: Sequence[Path] | None) -> None:
    """The source of captions, and what becomes of them.

    Args:
        levels: Where a subset's keys may stand.
        entry: Gets the keys of the dataset.
        images: The images; None if they are not at hand.
    """
    suffix_at = levels.at("caption_extension")
    suffix = suffix_at.text("caption_extension") or ".caption"
    tokens = levels.at("class_tokens").text("class_tokens")
    with_text = [image for image in images or () if image.with_suffix(suffix).is_file()]
    is_read = suffix.lower() in text_suffixes()
    uses_files = is_read and bool(with_text or images is None)
    if uses_files and with_text:
        entry["caption_strategy"] = "textfile"
    elif not uses_files and tokens:
        entry["caption_strategy"] = "instanceprompt"
    elif not tokens:
        entry["caption_strategy"] = "textfile"
    if tokens and not with_text:
        entry["instance_prompt"] = tokens
    for key in ("caption_prefix", "caption_suffix"):
        if levels.at(key).text(key):
            levels.at(key).put(key, key, levels.at(key).text(key), into=entry)
    _decide_captions(levels, entry, images, with_text=with_text, suffix=suffix)
    _wildcards(levels, entry)
    captions = [first_line(image.with_suffix(suffix)) for image in with_text] if uses_files else [tokens]
    _tags(levels, entry, None if images is None else captions)
    _dropout(levels, entry)


def _decide_captions(
    levels: Levels,
    entry: Mapping[str, JsonValue],
    images: Sequence[Path] | None,
    *,
    with_text: Sequence[Path],
    suffix: str,
) -> None:
    suffix_at, tokens_at = levels.at("caption_extension"), levels.at("class_tokens")
    tokens = tokens_at.text("class_tokens")
    strategy = f"caption_strategy: {entry.get('caption_strategy', 'text files where there are any')}"
    missing = len(images or ()) - len(with_text)
    if with_text and missing:
        instead = f"kohya's scripts would take {tokens!r}" if tokens else "as with kohya's scripts"
        text = (
            f"{counted(missing, 'image has', 'images have')} no {suffix} file and no caption here; {instead}."
        )
        suffix_at.decide(
            "caption_extension", "approximate" if tokens else "translated", ours=strategy, text=text
        )
        if tokens:
            suffix_at.draft.to_do.append(
                f"{entry['instance_data_dir']}: write {tokens!r} into the missing {suffix} files."
            )
    elif suffix.lower() not in text_suffixes():
        text = f"Files {suffix} are not read here: rename them to .txt, and remove caption_strategy."
        suffix_at.decide("caption_extension", "not translated", text=text)
    else:
        suffix_at.decide("caption_extension", "translated", ours=strategy, text="")
    if tokens_at.has("class_tokens"):
        ours = f"instance_prompt: {entry.get('instance_prompt')}" if "instance_prompt" in entry else ""
        outcome: Outcome = "translated" if ours else "no effect"
        tokens_at.decide("class_tokens", outcome, ours=ours, text="Of images without a caption file.")


def _wildcards(levels: Levels, entry: dict[str, JsonValue]) -> None:
    at, key = levels.at("enable_wildcard"), "enable_wildcard"
    is_on = at.flag(key)
    entry["caption_lines"] = "choose" if is_on else "first"
    ours = f"caption_lines: {entry['caption_lines']}"
    if is_on:
        entry[key] = True
        at.decide(key, "approximate", ours=f"{key}: true, {ours}", text=DRAWN)
    else:
        at.decide(key, "translated", ours=ours, text="Without it the first line is the caption.")


def _tags(levels: Levels, entry: dict[str, JsonValue], captions: Sequence[str] | None) -> None:
    """The order and the dropout of tags; `captions` is None if they are not at hand."""
    tags = Tags(
        separator=str(levels.at("caption_separator").value("caption_separator")),
        num_kept=levels.at("keep_tokens").whole("keep_tokens"),
        shuffles=levels.at("shuffle_caption").flag("shuffle_caption"),
        dropout=levels.at("caption_tag_dropout_rate").number("caption_tag_dropout_rate"),
        keep_separator=levels.at("keep_tokens_separator").text("keep_tokens_separator"),
    )
    around = [entry.get("caption_prefix", ""), entry.get("caption_suffix", "")]
    whole = None if captions is None else [f"{around[0]} {each} {around[1]}" for each in captions]
    put_tags(tags, entry, captions=whole, at=levels.at, names=_TAG_KEYS)


def _dropout(levels: Levels, entry: dict[str, JsonValue]) -> None:
    at, key = levels.at("caption_dropout_rate"), "caption_dropout_rate"
    rate = number(at.number(key))
    entry["caption_dropout_probability"] = rate
    if at.has(key):
        at.decide(key, "translated", ours=f"caption_dropout_probability: {rate}", text="")
