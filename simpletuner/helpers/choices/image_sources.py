"""Places of images, the values of `type` in the dataset json."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.helpers.choices.registry import Choice, Registry


@dataclass(frozen=True, kw_only=True)
class ImageSourceChoice(Choice):
    """A kind of source; `build` names a function (entry of the dataset json) -> ImageSource."""

    schemes: tuple[str, ...] = ()
    """Schemes of URLs in instance_data_dir that pick it by themselves."""
    needs_folder: bool = False
    """Whether instance_data_dir is a folder on this machine, which must hold an image."""


_SOURCES = "simpletuner.helpers.data.sources"

IMAGE_SOURCES = Registry(
    ImageSourceChoice(
        name="local",
        summary="A folder on this machine.",
        build=f"{_SOURCES}.local:local_folder",
        needs_folder=True,
    ),
)
