"""What is worth a look in the images of a configuration, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from simpletuner.helpers.data.buckets import enlargement
from simpletuner.helpers.data.planned import PlannedImage
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.reporting.data_page.duplicates import MOST_BITS, groups, nearest, same
from simpletuner.helpers.reporting.data_page.measures import FLATTEST, HASH_BITS, Measures
from simpletuner.helpers.reporting.data_page.texts import holds, texts_of

BLURRED = 10.0
"""Variance of the Laplacian. Photographs at 1024 px had 60 to 100, after a Gaussian blur of 2 px 7 to 11."""
MOST_CUT_OFF = 0.4
"""Part of an image; a square of a 3:2 photograph cuts off a third."""
_NAMED = 3

KINDS = {
    "masked": ("Masked out", "The mask is black in the whole crop. Such an image is left out of training."),
    "duplicate": (
        "Duplicates",
        "The same bytes or the same pixels. Each copy is trained as often as any image.",
    ),
    "near": (
        "Near-duplicates",
        f"Their perceptual hashes differ in at most {MOST_BITS} of 64 bits. Keep the best of them.",
    ),
    "enlarged": ("Enlarged", "Smaller than their bucket. minimum_image_size leaves small images out."),
    "blurred": (
        "Perhaps blurred",
        f"The variance of the Laplacian at the training size is below {BLURRED:g}. Soft or flat images have "
        "a low one too: look at them, sorted by sharpness.",
    ),
    "blank": ("Nearly one colour", f"The grey values of the crop deviate by less than {FLATTEST:g} of 255."),
    "cut": ("Cut", f"The crop leaves out more than {MOST_CUT_OFF:.0%} of the image."),
    "uncaptioned": (
        "Without a caption",
        "Trained without one, or with what is put before and after it alone.",
    ),
    "trigger": ("Trigger", "Captions without the trigger; of regularisation images, captions with it."),
    "repeated": ("The same caption", "Other images have the same caption, and are other images."),
}
"""Key -> title and explanation, in the order in which images with findings are shown."""


@dataclass(slots=True)
class LookedImage:
    """A planned image, its measures, and what was found."""

    planned: PlannedImage
    measures: Measures
    triggers: tuple[str, ...]
    """Of which each caption should hold one; of a regularisation image, none. Empty without a check."""
    is_uncaptioned: bool
    is_regularisation: bool
    is_held_out: bool
    """Whether it, or the same bytes in another dataset, is only evaluated."""
    has_one_caption: bool
    """Whether all images of its dataset have the same caption, as instance_prompt."""
    findings: dict[str, str] = field(default_factory=dict)
    """Key of KINDS -> sentence."""
    group: int = 0
    """The same number for images that are, or look, the same."""

    @property
    def name(self) -> str:
        """Dataset and name, as others refer to it."""
        return f"{self.planned.sample.path} ({self.planned.sample.dataset_id})"


@dataclass(frozen=True, slots=True)
class _Others:
    """Other images that share something with one."""

    number: int = 0
    first: tuple[int, ...] = ()
    """The places of a few."""
    bits: int = 0
    """In which the perceptual hashes differ, of near-duplicates."""


def find(images: Sequence[LookedImage]) -> None:
    """Note the findings of each image, and its group."""
    copies = _copies(images)
    near = _near(images)
    numbers = groups([(*copies[place].first, *near[place].first) for place in range(len(images))])
    for image, number in zip(images, numbers, strict=True):
        image.group = number
    captions = _same_captions(images)
    for place, image in enumerate(images):
        found = {
            "masked": image.measures.mask_problem and f"It is left out: {image.measures.mask_problem}.",
            "duplicate": copies[place].number and _duplicate(images, place, copies[place]),
            "near": near[place].number and _looks_like(images, near[place]),
            **dict(_of_pixels(image)),
            **dict(_of_captions(image)),
            "repeated": captions[place].number and _repeated(images, captions[place]),
        }
        image.findings = {key: text for key, text in found.items() if text}


def _copies(images: Sequence[LookedImage]) -> list[_Others]:
    """For each image the others with the same pixels; a file that two datasets use is no copy of itself."""
    return _sharing([each.measures.pixels for each in images], [each.planned.file.place for each in images])


def _near(images: Sequence[LookedImage]) -> list[_Others]:
    """For each image the one of other pixels that looks most like it."""
    firsts: dict[str, int] = {}
    for place, image in enumerate(images):
        if image.measures.look is not None:
            firsts.setdefault(image.measures.pixels, place)
    places = list(firsts.values())
    looks = nearest([images[place].measures.look or 0 for place in places])
    found = {
        images[place].measures.pixels: _Others(1, (places[each.place],), each.bits)
        for place, each in zip(places, looks, strict=True)
        if each is not None
    }
    return [found.get(image.measures.pixels, _Others()) for image in images]


def _same_captions(images: Sequence[LookedImage]) -> list[_Others]:
    """For each image the others, of another look, with the same captions."""
    keys = [
        None if each.is_uncaptioned or each.has_one_caption else texts_of(each.planned) for each in images
    ]
    return _sharing(keys, [each.group for each in images])


def _sharing(keys: Sequence[Hashable | None], labels: Sequence[Hashable]) -> list[_Others]:
    """For each place the others of the same key and another label; none for the key None."""
    found = [_Others()] * len(keys)
    for members in same(keys):
        sizes = Counter(labels[place] for place in members)
        for place in members if len(sizes) > 1 else ():
            others = (each for each in members if labels[each] != labels[place])
            found[place] = _Others(len(members) - sizes[labels[place]], tuple(islice(others, _NAMED)))
    return found


def _duplicate(images: Sequence[LookedImage], place: int, others: _Others) -> str:
    digests = {images[each].planned.digest for each in (place, *others.first)}
    return f"Its {'bytes' if len(digests) == 1 else 'pixels'} are those of {_names(images, others)}."


def _looks_like(images: Sequence[LookedImage], others: _Others) -> str:
    return f"It looks like {_names(images, others)}: {counted(others.bits, 'bit')} of {HASH_BITS} differ."


def _repeated(images: Sequence[LookedImage], others: _Others) -> str:
    return f"{_names(images, others)} {'has' if others.number == 1 else 'have'} its caption."


def _names(images: Sequence[LookedImage], others: _Others) -> str:
    names = [images[each].name for each in others.first]
    if others.number > len(names):
        return f"{', '.join(names)} and {others.number - len(names):,} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _of_pixels(image: LookedImage) -> Iterator[tuple[str, str]]:
    sample, measures = image.planned.sample, image.measures
    resized_px = sample.resized_px
    factor = enlargement(sample.original_px, resized_px)
    if factor > 1:
        yield "enlarged", f"It is enlarged {factor:.2f} times, from {sample.original_px} to {resized_px} px."
    if measures.contrast < FLATTEST:
        yield "blank", f"Its grey values deviate by {measures.contrast:.1f}."
    elif measures.sharpness < BLURRED:
        yield "blurred", f"The variance of its Laplacian is {measures.sharpness:.1f}."
    kept = sample.target_px.height * sample.target_px.width / (resized_px.height * resized_px.width)
    if 1 - kept > MOST_CUT_OFF:
        yield "cut", f"The crop leaves out {1 - kept:.0%} of it."


def _of_captions(image: LookedImage) -> Iterator[tuple[str, str]]:
    if image.is_uncaptioned:
        yield "uncaptioned", "It has no caption."
        return
    if not image.triggers:
        return
    texts = texts_of(image.planned)
    holding = sum(any(holds(text, each) for each in image.triggers) for text in texts)
    words = " or ".join(f'"{each}"' for each in image.triggers)
    if image.is_regularisation and holding:
        yield "trigger", f"{_share(holding, len(texts))} {words}, though it is a regularisation image."
    if not image.is_regularisation and holding < len(texts):
        missing = len(texts) - holding
        yield "trigger", f"{_share(missing, len(texts), without=True)} {words}."


def _share(number: int, total: int, *, without: bool = False) -> str:
    verb = ("lacks", "lack") if without else ("holds", "hold")
    if total == 1:
        return f"Its caption {verb[0]}"
    return f"{number} of its {total} captions and variants {verb[0] if number == 1 else verb[1]}"
