"""Sources of captions: the values of `caption_strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry


@dataclass(frozen=True, kw_only=True)
class CaptionSource(Choice):
    """A caption source; `build` names a CaptionReader of data/captions.py."""

    suffix: str = ""
    """Of its files beside the images, lower case; empty for a source without files."""
    further_suffixes: tuple[str, ...] = ()
    """Read where no file with `suffix` lies beside the image, in this order; lower case."""
    needs_instance_prompt: bool = False


_CAPTIONS = "simpletuner.helpers.data.captions"

CAPTION_SOURCES = Registry(
    CaptionSource(
        name="textfile",
        summary="The .txt or .caption file beside an image, one caption per line.",
        build=f"{_CAPTIONS}:TextFileCaptions",
        suffix=".txt",
        further_suffixes=(".caption",),
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
    sources = CAPTION_SOURCES.values()
    suffixes = (suffix for each in sources for suffix in (each.suffix, *each.further_suffixes))
    return tuple(dict.fromkeys(filter(None, suffixes)))
