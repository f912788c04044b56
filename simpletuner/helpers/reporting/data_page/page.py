"""Renders and writes the page of `simpletuner data look`."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.io.atomic import write_text
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.reporting.data_page.findings import KINDS, LookedImage
from simpletuner.helpers.reporting.data_page.look import LookedDataset, epochs_of
from simpletuner.helpers.reporting.data_page.measures import Thumbnail
from simpletuner.helpers.reporting.data_page.texts import TextCounts, texts_of
from simpletuner.helpers.reporting.html_report.folder import display_path
from simpletuner.helpers.reporting.html_report.markup import (
    definition_list,
    disclosure,
    document,
    escape,
    format_number,
    note,
    section,
)

_HERE = Path(__file__).parent
_MOST_LEFT_OUT = 500
_MOST_COUNTED = 120
_MOST_RARE = 300
_CAPTIONS_AT_ONCE = 3


def write_page(
    file: Path, looked: Sequence[LookedDataset], config: RunConfig, *, name: str, limit: int
) -> None:
    """Render the page and write it.

    Args:
        file: To write.
        looked: The datasets.
        config: The run.
        name: Of the configuration.
        limit: Images that are shown at most, those with findings first.

    Raises:
        StorageError: The file is not writable.
    """
    write_text(file, render_page(looked, config, name=name, limit=limit))


def render_page(looked: Sequence[LookedDataset], config: RunConfig, *, name: str, limit: int) -> str:
    """The page as one self-contained HTML document."""
    images = sorted((image for each in looked for image in each.images), key=_order)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("data.css", "data.js"))
    title = f"Data of {name}"
    blocks = (
        _heading(title, looked, config),
        section("findings", "Findings", _findings(looked, images)),
        section("datasets", "Datasets", *map(_dataset, looked)),
        section(
            "captions", "Captions", *(_texts(each) for each in looked if each.images), _unchecked(images)
        ),
        section("images", "Images", _gallery(images, limit=limit)),
    )
    return document(title, "\n".join(filter(None, blocks)), style=style, script=script)


def _order(image: LookedImage) -> tuple[int, int, str, str]:
    """Images with findings first, by the first of them; then those that look the same side by side."""
    kinds = list(KINDS)
    first = min((kinds.index(key) for key in image.findings), default=len(kinds))
    sample = image.planned.sample
    return (
        first,
        image.group if "duplicate" in image.findings or "near" in image.findings else 0,
        (sample.dataset_id),
        sample.path,
    )


def _heading(title: str, looked: Sequence[LookedDataset], config: RunConfig) -> str:
    images = [image for each in looked for image in each.images]
    epochs = epochs_of(looked, config)
    reached = epochs.reached(config.training) if epochs.stretches else []
    entries = [
        ("images", format_number(len(images))),
        ("with findings", format_number(sum(bool(each.findings) for each in images))),
        ("left out", format_number(sum(len(each.skipped) for each in looked))),
        (
            "batches per epoch",
            ", then ".join(format_number(each.length) for each in reached) or None,
        ),
    ]
    size = config.training.train_batch_size
    facts = definition_list(entries).replace('class="facts"', 'class="facts headline"')
    text = (
        f"Each image as the run with seed {config.training.seed} cuts it, with its captions as they are "
        f"trained. A batch is of {counted(size, 'image')}, on one process."
    )
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(text)}</p>\n{facts}\n</header>"


def _findings(looked: Sequence[LookedDataset], images: Sequence[LookedImage]) -> str:
    problems = "".join(f'<p class="problem">{escape(each.problem)}</p>' for each in looked if each.problem)
    numbers = Counter(key for image in images for key in image.findings)
    rows = [
        f'<tr><td class="number">{numbers[key]:,}</td><th scope="row"><a href="#images" data-kind="{key}">'
        f"{escape(title)}</a></th><td>{escape(text)}</td></tr>"
        for key, (title, text) in KINDS.items()
        if numbers[key]
    ]
    table = f'<table class="findings">{"".join(rows)}</table>' if rows else ""
    nothing = (
        "" if problems or rows or not images else note("Nothing was found in the images that are trained.")
    )
    return f"{problems}{table}{nothing}{_left_out(looked)}"


def _left_out(looked: Sequence[LookedDataset]) -> str:
    skipped = [each for dataset in looked for each in dataset.skipped]
    if not skipped:
        return ""
    items = "".join(
        f"<li>{escape(each.path)} <small>{escape(each.dataset_id)}</small>: {escape(each.reason)}</li>"
        for each in skipped[:_MOST_LEFT_OUT]
    )
    more = len(skipped) - _MOST_LEFT_OUT
    rest = note(f"And {more:,} more.") if more > 0 else ""
    return f'<h3>Left out: {counted(len(skipped), "file")}</h3><ul class="left-out">{items}</ul>{rest}'


def _dataset(looked: LookedDataset) -> str:
    config = looked.config
    crop = f"{config.crop_style}, {config.crop_aspect}" if config.crop else "none"
    entries = [
        ("folder", display_path(config.folder) if config.folder is not None else config.place),
        ("images", format_number(len(looked.images))),
        ("held out", sum(each.is_held_out for each in looked.images) or None),
        ("left out", len(looked.skipped) or None),
        ("trained at", f"{config.resolution:g} ({config.resolution_type})"),
        ("crop", crop),
        ("kind", "regularisation" if config.is_regularisation_data else None),
    ]
    rows = "".join(
        f"<tr><th scope=row>{escape(each.size)}</th><td>{each.num_images:,}</td>"
        f"<td>{each.draws_per_epoch:,}</td><td>{each.batches_per_epoch:,}</td></tr>"
        for each in looked.buckets
    )
    heads = "".join(
        f"<th scope=col>{each}</th>" for each in ("bucket", "images", "draws per epoch", "batches per epoch")
    )
    table = (
        f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>' if rows else ""
    )
    return f"<h3>{escape(config.id)}</h3>\n{definition_list(entries)}\n{table}"


def _unchecked(images: Sequence[LookedImage]) -> str:
    if not images or any(each.triggers for each in images):
        return ""
    return note("No trigger is known: --trigger TEXT lists the captions without it.")


def _texts(looked: LookedDataset) -> str:
    texts = looked.texts
    if texts.longest is None:
        return f"<h3>{escape(looked.config.id)}</h3>{note('No image has a caption.')}"
    path, words = texts.longest
    facts = (
        f"{texts.num_captioned:,} of {counted(len(looked.images), 'image')} with a caption, of "
        f"{counted(texts.median_words, 'word')} in the median; {path} has the longest, "
        f"{counted(words, 'word')}. A text encoder reads a part of a long caption only."
    )
    frequent = _counts(texts, texts.counts[:_MOST_COUNTED])
    rare = [name for name, number in texts.counts[_MOST_COUNTED:] if number == 1]
    hidden = len(texts.counts) - _MOST_COUNTED - len(rare)
    rest = note(f"And {counted(hidden, texts.noun)} in fewer images.") if hidden > 0 else ""
    once = ", ".join(rare[:_MOST_RARE]) + (", ..." if len(rare) > _MOST_RARE else "")
    single = disclosure(f"{counted(len(rare), texts.noun)} of one image only", f"<p>{escape(once)}</p>")
    return (
        f"<h3>{escape(looked.config.id)}</h3><p>{escape(facts)}</p>{frequent}{rest}{single if rare else ''}"
    )


def _counts(texts: TextCounts, counts: Iterable[tuple[str, int]]) -> str:
    items = "".join(
        f"<li>{escape(name)} <b>{number:,}</b> <small>{number / texts.num_captioned:.0%}</small></li>"
        for name, number in counts
    )
    return f"<h4>Images by {texts.noun}</h4><ul class=counts>{items}</ul>"


def _gallery(images: Sequence[LookedImage], *, limit: int) -> str:
    if not images:
        return ""
    ranks = {id(each): rank for rank, each in enumerate(sorted(images, key=_sharpness), start=1)}
    cards = "\n".join(_card(each, rank=ranks[id(each)], total=len(images)) for each in images[:limit])
    options = "".join(f'<option value="{key}">{escape(title)}</option>' for key, (title, _) in KINDS.items())
    bar = (
        '<form id="filter"><label>Find <input type="search" name="text"></label> '
        f'<label>Show <select name="kind"><option value="">all</option>{options}</select></label> '
        '<label>Sort <select name="order"><option value="">findings first</option>'
        '<option value="sharpness">least sharp first</option><option value="name">name</option></select>'
        "</label> <output></output></form>"
    )
    left = len(images) - limit
    rest = (
        f"{limit:,} of {counted(len(images), 'image')} shown, those with findings first; --limit shows more."
        if left > 0
        else ""
    )
    return f"{note(rest)}{bar}\n<div class=cards>\n{cards}\n</div>"


def _sharpness(image: LookedImage) -> float:
    return image.measures.sharpness


def _card(image: LookedImage, *, rank: int, total: int) -> str:
    sample, measures = image.planned.sample, image.measures
    thumbnails = "".join(_thumbnail(each, alt=sample.path) for each in measures.thumbnails)
    facts = (
        f"{sample.dataset_id}: {sample.original_px} px, bucket {image.planned.bucket}; sharpness "
        f"{format_number(round(measures.sharpness, 1))}, {rank:,} of {total:,} from the least"
        f"{'; held out' if image.is_held_out else ''}"
    )
    findings = "".join(
        f'<li class="{key}"><b>{escape(KINDS[key][0])}.</b> {escape(text)}</li>'
        for key, text in image.findings.items()
    )
    return (
        f'<figure data-kinds="{" ".join(image.findings)}" data-sharpness="{measures.sharpness:.3f}" '
        f'data-name="{escape(sample.path)}"><div>{thumbnails}</div><figcaption><b>{escape(sample.path)}</b> '
        f"<small>{escape(facts)}</small>{f'<ul>{findings}</ul>' if findings else ''}{_captions(image)}"
        "</figcaption></figure>"
    )


def _captions(image: LookedImage) -> str:
    texts = [text for text in texts_of(image.planned) if text]
    if not texts:
        return ""
    shown = "".join(f"<p>{escape(text)}</p>" for text in texts[:_CAPTIONS_AT_ONCE])
    others = "".join(f"<p>{escape(text)}</p>" for text in texts[_CAPTIONS_AT_ONCE:])
    more = len(texts) - _CAPTIONS_AT_ONCE
    return shown + (
        disclosure(f"{counted(more, 'other caption or variant', 'other captions and variants')}", others)
        if others
        else ""
    )


def _thumbnail(image: Thumbnail, *, alt: str) -> str:
    encoded = base64.b64encode(image.data).decode("ascii")
    title = "" if image.title == "image" else f"<small>{escape(image.title)}</small>"
    return (
        f'<span><img alt="{escape(f"{alt}, {image.title}")}" width="{image.width}" height="{image.height}" '
        f'loading="lazy" decoding="async" src="data:image/jpeg;base64,{encoded}">{title}</span>'
    )
