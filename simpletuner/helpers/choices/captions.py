"""Sources of captions, the values of `caption_strategy`, and the steps that change captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpletuner.helpers.choices.registry import Choice, Registry


@dataclass(frozen=True, kw_only=True)
class CaptionSource(Choice):
    """A caption source; `build` names a CaptionReader of data/captions.py."""

    suffix: str = ""
    """Of its files beside the images, lower case; empty for a source without files."""
    further_suffixes: tuple[str, ...] = ()
    """Read where no file with `suffix` lies beside the image, in this order; lower case."""
    has_other_uses: bool = False
    """Files with the suffix may be something else: one without an image of its name is no caption file."""
    tables: tuple[str, ...] = ()
    """Names of files that hold the captions of a folder."""
    needs_instance_prompt: bool = False


_CAPTIONS = "simpletuner.helpers.data.captions"
_METADATA = "simpletuner.helpers.data.metadata_captions"

CAPTION_SOURCES = Registry(
    CaptionSource(
        name="textfile",
        summary="The .txt or .caption file beside an image, one caption per line.",
        build=f"{_CAPTIONS}:TextFileCaptions",
        suffix=".txt",
        further_suffixes=(".caption",),
    ),
    CaptionSource(
        name="json",
        summary="The .json file beside an image: its caption, captions, text, prompt or tags.",
        build=f"{_METADATA}:JsonCaptions",
        suffix=".json",
        has_other_uses=True,
    ),
    CaptionSource(
        name="metadata",
        summary="The image's row in a metadata.jsonl or metadata.csv of its folder or of one above.",
        build=f"{_METADATA}:MetadataCaptions",
        tables=("metadata.jsonl", "metadata.csv"),
    ),
    CaptionSource(
        name="filename",
        summary="The words of the file name.",
        build=f"{_CAPTIONS}:FileNameCaptions",
    ),
    CaptionSource(
        name="instanceprompt",
        summary="instance_prompt for every image.",
        aliases=("instance_prompt",),
        build=f"{_CAPTIONS}:InstancePromptCaptions",
        needs_instance_prompt=True,
    ),
    CaptionSource(
        name="table",
        summary="Columns of the table or dataset that holds the images, or of the table that parquet names.",
        aliases=("parquet", "csv", "jsonl", "huggingface"),
        build="simpletuner.helpers.data.table_captions:TableCaptions",
    ),
)


@dataclass(frozen=True, kw_only=True)
class CaptionStep(Choice):
    """A change of captions; `build` names a function (caption, dataset, draw) -> caption."""

    switch: str
    """Attribute of a dataset's configuration that is truthy if the step is on."""
    varies: Literal["never", "by order", "by variant", "by sample"] = "never"
    """What another draw of the same caption needs: by order, another order of caption_shuffle; by variant,
    another of caption_variants; by sample, nothing: it is drawn each time, and no text of its own results."""


_STEPS = "simpletuner.helpers.data.caption_steps"

CAPTION_STEPS = Registry(
    CaptionStep(
        name="filter",
        summary="Remove and replace by caption_filter_list.",
        build=f"{_STEPS}:filtered",
        switch="caption_filter_list",
    ),
    CaptionStep(
        name="prefix",
        summary="Put caption_prefix before the caption.",
        build=f"{_STEPS}:prefixed",
        switch="caption_prefix",
    ),
    CaptionStep(
        name="suffix",
        summary="Put caption_suffix after the caption.",
        build=f"{_STEPS}:suffixed",
        switch="caption_suffix",
    ),
    CaptionStep(
        name="wildcard",
        summary="Draw one of the alternatives in braces, with enable_wildcard.",
        build=f"{_STEPS}:wildcards_drawn",
        switch="enable_wildcard",
        varies="by variant",
    ),
    CaptionStep(
        name="tag dropout",
        summary="Drop tags at caption_tag_dropout_rate.",
        build=f"{_STEPS}:tags_dropped",
        switch="caption_tag_dropout_rate",
        varies="by variant",
    ),
    CaptionStep(
        name="shuffle",
        summary="Shuffle the tags by caption_shuffle.",
        build=f"{_STEPS}:shuffled",
        switch="arranges_tags",
        varies="by order",
    ),
    CaptionStep(
        name="caption dropout",
        summary="Train without the caption at caption_dropout_probability.",
        build=f"{_STEPS}:caption_dropped",
        switch="caption_dropout_probability",
        varies="by sample",
    ),
)
"""In the order in which they are taken."""


def caption_suffixes() -> tuple[str, ...]:
    """Suffixes of the files that some source reads."""
    sources = CAPTION_SOURCES.values()
    suffixes = (suffix for each in sources for suffix in (each.suffix, *each.further_suffixes))
    return tuple(dict.fromkeys(filter(None, suffixes)))


def text_suffixes() -> tuple[str, ...]:
    """Suffixes of the text files that hold captions."""
    source = CAPTION_SOURCES["textfile"]
    return (source.suffix, *source.further_suffixes)


def shared_suffixes() -> tuple[str, ...]:
    """Suffixes of caption files that may be something else."""
    return tuple(each.suffix for each in CAPTION_SOURCES.values() if each.has_other_uses)


def caption_tables() -> frozenset[str]:
    """Names of the files that hold the captions of a folder."""
    return frozenset(name for each in CAPTION_SOURCES.values() for name in each.tables)
