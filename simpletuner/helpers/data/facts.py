"""What a resumed run compares of its images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import xxhash

from simpletuner.helpers.data.index import sorted_hex
from simpletuner.helpers.data.planned import PlannedImages
from simpletuner.helpers.data.references import PlannedReference, reference_fact
from simpletuner.helpers.io.atomic import JsonValue
from simpletuner.helpers.io.names import printable


def facts_of(
    images: PlannedImages, owner: str, *, content_of: Callable[[PlannedReference], str]
) -> dict[str, JsonValue]:
    """Number and identity of some images.

    Args:
        images: Of one dataset.
        owner: Begins the name of each fact.
        content_of: Gives the identity of a reference's pixels.
    """
    facts: dict[str, JsonValue] = {
        f"{owner}, number of images": len(images),
        f"{owner}, hash of all images": _hash_of_all(map(repr, sorted_hex(images.digests))),
        f"{owner}, hash of all captions": _hash_of_all(_captions_by_path(images)),
    }
    if masks := sorted(mask.key for mask in images.masks or () if mask is not None):
        facts[f"{owner}, hash of all masks"] = _hash_of(masks)
    references = sorted(
        reference_fact(image.sample.path, each, content=content_of(each))
        for image in (images if images.references is not None else ())
        for each in image.references
    )
    if references:
        facts[f"{owner}, hash of all references"] = _hash_of(references)
    return facts


def _hash_of(value: object) -> str:
    return xxhash.xxh3_64_hexdigest(repr(value).encode("utf-8", "surrogateescape"))


def _hash_of_all(shown: Iterable[str]) -> str:
    """`_hash_of` the list of the values that are shown so, which is never in memory as a whole."""
    digest = xxhash.xxh3_64(b"[")
    for number, each in enumerate(shown):
        digest.update(f"{', ' if number else ''}{each}".encode("utf-8", "surrogateescape"))
    digest.update(b"]")
    return digest.hexdigest()


def _captions_by_path(images: PlannedImages) -> Iterator[str]:
    """Every variant of the captions of each image, in the order of the images' shown names."""
    names, captions = list(images.files.names), images.captions
    if all(map(str.isprintable, names)):
        order = sorted(range(len(names)), key=names.__getitem__)
    else:  # two names may be shown alike
        texts = [sum(captions.of(row), ()) for row in range(len(names))]
        order = sorted(range(len(names)), key=lambda row: (printable(names[row]), texts[row]))
    return (repr(sum(captions.of(row), ())) for row in order)
