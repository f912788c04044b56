"""Which files of a dataset's folder are images: suffixes, packages that some of them need, names of masks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

_JPEG = (".jpg", ".jpeg", ".jfif", ".jpe", ".pjpeg", ".pjp")
_READ = frozenset((*_JPEG, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))
# Image files of other programs: photographs, drawings, layers. Nothing here decodes them.
_NEVER_READ = re.findall(
    r"\.\w+",
    ".ai .apng .arw .cr2 .cr3 .dds .dng .eps .exr .hdr .icns .ico .j2k .jp2 .jpf .jxr .nef .orf .pbm .pc"
    "x .pef .pgm .pnm .ppm .psb .psd .qoi .raf .raw .rw2 .sr2 .srw .svg .svgz .tga .wdp .xcf",
)
EXTRA = "formats"
"""Extra of this package that installs the packages of OPTIONAL."""


@dataclass(frozen=True, slots=True)
class OptionalFormat:
    """An image format that Pillow does not read by itself."""

    name: str
    """Pillow's name of it."""
    title: str
    suffixes: tuple[str, ...]
    package: str
    """Import name of the package that reads it."""
    distribution: str
    """Name by which pip installs the package."""

    @property
    def is_readable(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None

    @property
    def remedy(self) -> str:
        """What makes it readable."""
        return (
            f'it needs the package {self.distribution}: pip install "simpletuner-t[{EXTRA}]", '
            f'in a clone: pip install -e ".[{EXTRA}]"'
        )


HEIF = OptionalFormat("HEIF", "HEIF", (".heic", ".heif", ".hif"), "pillow_heif", "pillow-heif")
JPEG_XL = OptionalFormat("JXL", "JPEG XL", (".jxl",), "pillow_jxl", "pillow-jxl-plugin")
OPTIONAL = (HEIF, JPEG_XL)

# OneTrainer's masks and source images beside the images, and ai-toolkit's folder of control images.
_LABEL = re.compile(r"(.*)-(?:mask|cond)label\.\w+", re.IGNORECASE | re.DOTALL)
_CONTROL = re.compile(r"((?:.*/)?)_controls/([^/]+?)(?:\.\w+)?\.\w+", re.DOTALL)


def image_suffixes() -> frozenset[str]:
    """Suffixes of the images that can be read here, in lower case."""
    return _READ.union(*(each.suffixes for each in OPTIONAL if each.is_readable))


def unread_suffixes() -> dict[str, str]:
    """Suffix -> reason, of the images that cannot be read here."""
    reasons = dict.fromkeys(_NEVER_READ, "its format is not read here; save it as PNG, JPEG or WebP")
    missing = (each for each in OPTIONAL if not each.is_readable)
    return reasons | {suffix: each.remedy for each in missing for suffix in each.suffixes}


def conditioned_stem(name: str) -> str | None:
    """The name without suffix of the image that an image file belongs to as a mask or source image.

    None for every other image. Source: OneTrainer's `NAME-masklabel.png` and `NAME-condlabel.png`,
    ai-toolkit's `_controls/NAME.TYPE.jpg`.
    """
    if match := _LABEL.fullmatch(name):
        return match[1]
    match = _CONTROL.fullmatch(name)
    return match[1] + match[2] if match else None
