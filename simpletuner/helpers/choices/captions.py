"""Sources of captions: the values of `caption_strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry


@dataclass(frozen=True, kw_only=True)
class CaptionSource(Choice):
    """A caption source; `build` names a CaptionReader of data/captions.py."""

    suffix: str = ""
    """Of its files beside the images, lower case; empty for a source without files."""
    needs_instance_prompt: bool = False


_CAPTIONS = "simpletuner.helpers.data.captions"

CAPTION_SOURCES = Registry(
    CaptionSource(
        name="textfile",
        summary="The .txt file beside an image, one caption per line.",
        build=f"{_CAPTIONS}:TextFileCaptions",
        suffix=".txt",
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
)


def caption_suffixes() -> tuple[str, ...]:
    """Suffixes of the files that some source reads."""
    return tuple({source.suffix: None for source in CAPTION_SOURCES.values() if source.suffix})
