"""What a dataset's folder gives to training, in log lines: the source of captions, and the files left out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable

from simpletuner.helpers.choices.captions import shared_suffixes, text_suffixes
from simpletuner.helpers.choices.image_files import conditioned_stem
from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.captions import (
    CaptionColumn,
    CaptionReader,
    InstancePromptCaptions,
    TextFileCaptions,
    text_files_beside,
)
from simpletuner.helpers.data.columns import Texts
from simpletuner.helpers.data.metadata_captions import MetadataCaptions
from simpletuner.helpers.data.sources.base import Scan
from simpletuner.helpers.io.names import counted, printable
from simpletuner.helpers.io.redaction import redacted

logger = logging.getLogger(__name__)

_SHOWN = 5
SHOWN_CHARACTERS = 80
# Files in which other trainers and taggers keep captions, and their caches of latents and prompt embeds.
_CAPTION_SUFFIXES = frozenset(
    {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tags", ".cap", ".captions", ".xmp", ".yaml", ".yml"}
)
_CACHE_SUFFIXES = frozenset({".npz", ".npy", ".safetensors", ".pt", ".pth", ".bin"})


def listed(texts: Iterable[str]) -> str:
    """The first few distinct texts and the number of the others."""
    counted = Counter(texts)
    first = "; ".join(list(counted)[:_SHOWN])
    return first if len(counted) <= _SHOWN else f"{first}; and {len(counted) - _SHOWN} more"


def shown(text: str) -> str:
    """The beginning of a caption or prompt, quoted."""
    return repr(beginning(text))


def beginning(text: str) -> str:
    """The beginning of a caption or prompt, redacted before it is cut."""
    return printable(redacted(text)[:SHOWN_CHARACTERS])


def report_files(config: DatasetConfig, scan: Scan, reader: CaptionReader) -> None:
    """Log the files that are no images or captions of this dataset, each kind counted."""
    _report_unread(config, scan)
    if scan.conditioning:
        _report_conditioning(config, scan)
    _report_unread_texts(config, scan, reader)
    _report_others(config, scan, reader)
    _report_unused_rows(config, reader)


def _report_conditioning(config: DatasetConfig, scan: Scan) -> None:
    stems = set(scan.images.stems())
    paired = sum(conditioned_stem(name) in stems for name in scan.conditioning)
    logger.warning(
        "Dataset %s: %s as masks or source images and not trained on: %s. %s",
        config.id,
        counted(len(scan.conditioning), "file is named", "files are named"),
        listed(map(printable, scan.conditioning)),
        f"{paired} of them are conditioning data of images here, which are trained without it. Masks and "
        "references have a folder of their own, the names of their images, and an entry that "
        "conditioning_data names."
        if paired
        else "No image here has their name.",
    )


def _report_unread_texts(config: DatasetConfig, scan: Scan, reader: CaptionReader) -> None:
    if not len(scan.texts) or set(text_suffixes()) <= set(reader.suffixes):
        return
    unread = {file.name for image in scan.images for file in text_files_beside(image, scan)}
    unread -= {file.name for image in scan.images for file in reader.caption_files(image)}
    if unread:
        reason = (
            "only_instance_prompt is true"
            if config.only_instance_prompt
            else f'caption_strategy is "{config.caption_strategy}"'
        )
        logger.warning(
            'Dataset %s: %s not read, because %s: %s. To train them, set caption_strategy to "textfile"%s.',
            config.id,
            counted(len(unread), "text file beside the images is", "text files beside the images are"),
            reason,
            listed(sorted(map(printable, unread))),
            " and only_instance_prompt to false" if config.only_instance_prompt else "",
        )


def _report_unread(config: DatasetConfig, scan: Scan) -> None:
    unread: dict[tuple[str, str], list[str]] = {}
    for name, reason in scan.unread:
        unread.setdefault((os.path.splitext(name)[1].lower(), reason), []).append(printable(name))
    for (suffix, reason), names in unread.items():
        logger.warning(
            "Dataset %s: skipped %s: %s: %s.",
            config.id,
            counted(len(names), f"{suffix} image"),
            listed(names),
            reason,
        )


def _report_others(config: DatasetConfig, scan: Scan, reader: CaptionReader) -> None:
    orphans = [file.name for file in scan.orphans()]
    captions = _other_captions(config, scan, reader)
    kinds: dict[str, list[str]] = {"captions": [*captions], "caches": [], "others": []}
    for name in scan.others:
        if _is_read_table(config, name):
            continue
        suffix = os.path.splitext(name)[1].lower()
        is_caption, is_cache = suffix in _CAPTION_SUFFIXES, suffix in _CACHE_SUFFIXES
        kinds["captions" if is_caption else "caches" if is_cache else "others"].append(name)
    parts = [
        f"{counted(len(names), *title)} ({listed(map(printable, names))})"
        for title, names in (
            (("text file without an image", "text files without an image"), orphans),
            (("that may hold captions",) * 2, kinds["captions"]),
            (("cache of tensors", "caches of tensors"), kinds["caches"]),
            (("other", "others"), kinds["others"]),
        )
        if names
    ]
    if parts:
        level = logging.WARNING if orphans or kinds["captions"] else logging.INFO
        number = counted(len(orphans) + sum(map(len, kinds.values())), "file is", "files are")
        remedy = (
            ' caption_strategy "json" reads .json files beside images, "metadata" a metadata.jsonl or '
            "metadata.csv."
            if captions
            else ""
        )
        logger.log(level, "Dataset %s: %s not read: %s.%s", config.id, number, "; ".join(parts), remedy)


def _is_read_table(config: DatasetConfig, name: str) -> bool:
    """Whether a file is the table of captions that `parquet` names."""
    return (
        config.parquet is not None
        and config.folder is not None
        and config.folder / name == config.parquet.path
    )


def unread_tables(config: DatasetConfig, scan: Scan, reader: CaptionReader) -> list[str]:
    """Names of the tables of captions (metadata.jsonl) that the source of captions does not read."""
    tables = () if reader.reads_metadata else scan.tables
    return [each.name for each in tables if not _is_read_table(config, each.name)]


def _other_captions(config: DatasetConfig, scan: Scan, reader: CaptionReader) -> list[str]:
    """JSON files and tables that the source of captions does not read, and JSON files without an image."""
    unread = tuple(suffix for suffix in shared_suffixes() if suffix != reader.suffix)
    beside = [
        file for files in scan.captions.values() for file in files if file.name.lower().endswith(unread)
    ]
    names = dict.fromkeys(file.name for file in (*beside, *scan.strays()))
    unread_names = [name for name in names if not _is_read_table(config, name)]
    return [*unread_names, *unread_tables(config, scan, reader)]


def _report_unused_rows(config: DatasetConfig, reader: CaptionReader) -> None:
    unused = reader.unused() if isinstance(reader, MetadataCaptions) else []
    if unused:
        logger.warning(
            "Dataset %s: %s no image that is here: %s.",
            config.id,
            counted(len(unused), "row of the captions names", "rows of the captions name"),
            listed(unused),
        )


def report_captions(
    config: DatasetConfig, names: Texts, captions: CaptionColumn, *, reader: CaptionReader
) -> None:
    """Log the source of captions if caption_strategy is not set, several lines, and missing captions."""
    if config.caption_strategy is None and not config.only_instance_prompt:
        places = range(len(names))
        first = next((place for place in places if captions.notes.get(place) != "missing"), 0)
        logger.info(
            "Dataset %s: caption_strategy is not set; captions come from %s, for instance %s: %s.",
            config.id,
            _source(reader),
            printable(names[first]),
            shown(captions.firsts[first]),
        )
    noted: dict[str, list[str]] = {}
    for place, note in sorted(captions.notes.items()):
        noted.setdefault(note, []).append(printable(names[place]))
    others = {
        "instance_prompt": config.prepend_instance_prompt,
        "caption_prefix": config.caption_prefix,
        "caption_suffix": config.caption_suffix,
    }
    given = [key for key, value in others.items() if value]
    instead = f"with {' and '.join(given)} alone" if given else "without a caption"
    for kind, noted_names in noted.items():
        effect = "" if kind == "shortened" else f" These images are trained {instead}."
        found = listed(noted_names)
        number = counted(len(noted_names), "caption is", "captions are")
        logger.warning("Dataset %s: %s %s: %s.%s", config.id, number, kind, found, effect)
    _report_lines(config, names, captions, are_lines=not reader.reads_table)


def report_downsampled(config: DatasetConfig, number: int, total: int) -> None:
    """Log how many images are above maximum_image_size, if that has an effect."""
    if config.downsampling is None:
        return
    maximum, target = config.downsampling
    logger.info(
        "Dataset %s: %d of %s above maximum_image_size %g and resized to target_downsample_size %g before "
        "cropping.",
        config.id,
        number,
        counted(total, "image is", "images are"),
        maximum,
        target,
    )


def _source(reader: CaptionReader) -> str:
    suffixes = text_suffixes()
    if reader.reads_table:
        return "the table"
    if isinstance(reader, TextFileCaptions):
        return f"the text files ({', '.join(suffixes)}) beside the images"
    source = "instance_prompt" if isinstance(reader, InstancePromptCaptions) else "the file names"
    return f"{source}, because no {' or '.join(suffixes)} file lies beside an image"


def _report_lines(config: DatasetConfig, names: Texts, captions: CaptionColumn, *, are_lines: bool) -> None:
    """Log how many images have several captions, or a caption of several lines, with one of them."""
    whole = [place for place, text in enumerate(captions.firsts) if "\n" in text]
    if captions.several:
        place = min(captions.several)
        texts = captions.several[place]
        logger.info(
            "Dataset %s: %s several captions%s; each time an image is trained on, one is drawn, for instance "
            "of the %d of %s: %s.%s",
            config.id,
            _share(len(captions.several), len(names)),
            ", one for each line" if are_lines else "",
            len(texts),
            printable(names[place]),
            " or ".join(map(shown, texts[:2])),
            ' To train all lines as one caption, set caption_lines to "whole".' if are_lines else "",
        )
    if whole:
        logger.info(
            "Dataset %s: %s a caption of several lines, trained as a whole, for instance %s: %s.",
            config.id,
            _share(len(whole), len(names)),
            printable(names[whole[0]]),
            shown(captions.firsts[whole[0]]),
        )


def _share(number: int, total: int) -> str:
    return "the image has" if total == 1 else f"{number} of {total} images {'has' if number == 1 else 'have'}"
