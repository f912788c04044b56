"""Concepts of OneTrainer as datasets, and the length of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from simpletuner.helpers.configuration.migration.adapters import number
from simpletuner.helpers.configuration.migration.arithmetic import (
    Draws,
    Length,
    full_batches,
    one_trainer_bucket,
)
from simpletuner.helpers.configuration.migration.draft import Draft, Settings
from simpletuner.helpers.configuration.migration.paths import PLACEHOLDER, Place, unique_id
from simpletuner.helpers.configuration.migration.reading import flattened, read_structured, read_text
from simpletuner.helpers.configuration.migration.table import load_table
from simpletuner.helpers.configuration.migration.tags import Tags, first_line, put_tags
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.io.names import counted

_TAG_KEYS = {
    "shuffles": "text.enable_tag_shuffling",
    "num_kept": "text.keep_tags_count",
    "separator": "text.tag_delimiter",
    "dropout": "text.tag_dropout_probability",
}
PRIOR = "PRIOR_PREDICTION"
"""Type of a concept whose target is the prediction of the model without the adapter."""


def put_concepts(settings: Settings, place: Place) -> None:
    """The datasets of a run, and the keys that say how long it is.

    Raises:
        ConfigError: No concept is trained on.
    """
    concepts = settings.value("concepts")
    if not isinstance(concepts, list) or not concepts:
        concepts = list_of(settings, "concept_file_name", place)
    for key in ("concepts", "concept_file_name"):
        if settings.has(key):
            settings.decide(key, "translated", ours="the dataset json", text="")
    draft, rows = settings.draft, load_table("onetrainer").rows("concept")
    draws: list[Draws] | None = []
    for index, concept in enumerate(concepts):
        if not isinstance(concept, dict):
            raise ConfigError(f"concepts[{index}] must be an object with path. Correct it.")
        own = Settings(dict(flattened(concept)), rows, draft, place=f"concepts[{index}].")
        found = _concept(own, settings, place)
        draws = None if draws is None or found is None else draws + found
        own.finish(into={})
    if concepts and all("is_regularisation_data" in each for each in draft.datasets):
        raise ConfigError("No concept has images to train on: switch one on.")
    if not draft.datasets:
        # The decisions of a concept that is not in the file belong to no page.
        scratch = Draft(draft.program)
        _concept(Settings({"path": PLACEHOLDER}, rows, scratch), settings, place)
        draft.datasets.extend(scratch.datasets)
        draft.to_do.append(f"Set instance_data_dir: the file has no concepts, so it is {PLACEHOLDER}.")
        draws = None
    settings.decide("resolution", "translated", ours=f"resolution: {settings.text('resolution')}", text="")
    settings.decide("aspect_ratio_bucketing", "translated", ours="crop", text="")
    draft.config["aspect_bucket_alignment"] = 64
    _length(settings, draws)


def _concept(own: Settings, settings: Settings, place: Place) -> list[Draws] | None:
    """Add the datasets of a concept; returns its draws of an epoch, None if the folder is not here."""
    draft = own.draft
    if _is_left_out(own):
        return []
    folder = place.path(own.text("path"))
    entry: dict[str, JsonValue] = {"type": "local"}
    _put_type(own, entry)
    own.put("path", "instance_data_dir", folder, into=entry)
    images = _images(own, place, folder)
    overrides = own.flag("image.enable_resolution_override")
    text = own.text("image.resolution_override") if overrides else settings.text("resolution")
    edges = _edges(own if overrides else settings, text)
    for key in ("image.enable_resolution_override", "image.resolution_override"):
        if own.has(key):
            own.decide(key, "translated" if overrides else "no effect", ours=f"resolution: {text}", text="")
    _crop(own, settings, entry)
    _captions(own, entry, place, images=images)
    balancing, samples = own.number("balancing"), own.text("balancing_strategy").upper() == "SAMPLES"
    share = balancing
    if samples:
        share = balancing / len(images) if images else 1.0
        if not images:
            draft.to_do.append(f"{folder}: set probability to {balancing:g} over the number of images.")
    ours = _put_share(entry, share, num_sizes=len(edges))
    for key in ("balancing", "balancing_strategy"):
        own.decide(key, "translated" if images or not samples else "approximate", ours=ours, text="")
    name = own.text("name") or Path(folder).name or "images"
    for edge in edges:
        identity = unique_id(
            name if len(edges) == 1 else f"{name}-{edge:g}", [str(each["id"]) for each in draft.datasets]
        )
        draft.datasets.append(
            {"id": identity, **entry, "resolution": number(edge), "resolution_type": "pixel_area"}
        )
    if own.has("name"):
        own.decide("name", "translated", ours="id")
    if not images:
        return None
    total = int(balancing) if samples else math.floor(len(images) * balancing)
    return _draws(images, total, place=place, settings=settings, edge=int(edges[0]))


def _put_type(own: Settings, entry: dict[str, JsonValue]) -> None:
    if own.text("type").upper() == PRIOR:
        own.put("type", "is_regularisation_data", True, outcome="translated", text="", into=entry)


def _is_left_out(own: Settings) -> bool:
    """Whether a concept is switched off, or of a kind that is not trained on; then its keys are decided."""
    enabled = own.flag("enabled")
    if enabled and own.text("type").upper() in ("STANDARD", PRIOR):
        return False
    reason = own.rows["type"].text if enabled else "The concept is switched off."
    for key in own.values:
        own.decide(key, "not translated" if enabled else "no effect", text=reason)
    return True


def _images(own: Settings, place: Place, folder: str) -> list[Path] | None:
    """The images of a concept; None if its folder is not here."""
    key, ours = "include_subdirectories", "subfolders are always read"
    whole = own.flag(key)
    images = place.images(folder, with_subfolders=whole)
    if whole or images is None or len(place.images(folder, with_subfolders=True) or []) == len(images):
        own.decide(key, "translated", ours=ours, text="")
    else:
        own.decide(key, "approximate", ours=ours, text="Move them away.")
        own.draft.to_do.append(f"Move the subfolders of {folder} away: OneTrainer does not read them.")
    return images


def _draws(images: Sequence[Path], total: int, *, place: Place, settings: Settings, edge: int) -> list[Draws]:
    """An epoch of images: each equally often, or `total` of them spread evenly."""
    if not settings.flag("aspect_ratio_bucketing") or settings.whole("batch_size", 1) == 1:
        # One bucket, or one image to a batch: the sizes do not matter, and none is opened.
        return [Draws(Size(height=edge, width=edge), total)]
    buckets = [one_trainer_bucket(size, edge) for size in place.sizes(images)]
    times = total / len(buckets) if buckets else 0
    if times == int(times):
        return [Draws(bucket, int(times)) for bucket in buckets]
    chosen = (buckets[index * len(buckets) // total % len(buckets)] for index in range(total))
    return [Draws(bucket, 1) for bucket in chosen]


def _put_share(entry: dict[str, JsonValue], share: float, *, num_sizes: int) -> str:
    """Repeats for a whole number, else a probability; returns it in words."""
    if num_sizes == 1 and share >= 1 and share == int(share):
        entry["repeats"] = int(share) - 1
        return f"repeats: {int(share) - 1}"
    entry["probability"] = number(round(max(share / num_sizes, 1e-6), 6))
    return f"probability: {entry['probability']}"


def _edges(at: Settings, text: str) -> list[float]:
    """The resolutions: edges of squares of the same area."""
    try:
        if "x" in text and "," not in text:
            width, height = (int(part) for part in text.split("x"))
            return [round(math.sqrt(width * height), 2)]
        return [float(int(part)) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{at.place}resolution: {text!r}: must be an edge, several, or width x height."
        ) from None


def _crop(own: Settings, settings: Settings, entry: dict[str, JsonValue]) -> None:
    jitter, buckets = own.flag("image.enable_crop_jitter"), settings.flag("aspect_ratio_bucketing")
    entry["crop"] = jitter or not buckets
    if entry["crop"]:
        entry |= {
            "crop_aspect": "preserve" if buckets else "square",
            "crop_style": "random" if jitter else "center",
        }
    own.decide("image.enable_crop_jitter", "translated", ours=f"crop: {str(entry['crop']).lower()}")


def _captions(
    own: Settings, entry: dict[str, JsonValue], place: Place, *, images: Sequence[Path] | None
) -> None:
    _source(own, entry, place)
    files = [image.with_suffix(".txt") for image in images or ()]
    texts = [first_line(file) for file in files if file.is_file()]
    prompt = entry.get("instance_prompt")
    _tags(own, entry, [str(prompt)] if prompt is not None else None if images is None else texts)


def _tags(own: Settings, entry: dict[str, JsonValue], captions: Sequence[str] | None) -> None:
    mode = own.text("text.tag_dropout_mode").upper()
    drops = own.flag("text.tag_dropout_enable") and mode == "RANDOM"
    tags = Tags(
        separator=str(own.value("text.tag_delimiter")),
        num_kept=own.whole("text.keep_tags_count"),
        shuffles=own.flag("text.enable_tag_shuffling"),
        dropout=own.number("text.tag_dropout_probability") if drops else 0.0,
    )
    if own.flag("text.tag_dropout_enable") and not drops:
        for key in ("text.tag_dropout_enable", "text.tag_dropout_mode"):
            own.decide(key, "not translated", text="Tags are dropped each by itself here, which is RANDOM.")
    put_tags(tags, entry, captions=captions, at=lambda key: own, names=_TAG_KEYS)
    if own.has("text.tag_dropout_mode"):
        own.decide("text.tag_dropout_mode", "translated" if tags.dropout else "no effect", text="")
    if own.has("text.tag_dropout_enable"):
        own.decide("text.tag_dropout_enable", "translated" if tags.dropout else "no effect", text="")


def _source(own: Settings, entry: dict[str, JsonValue], place: Place) -> None:
    source = own.text("text.prompt_source").lower()
    ours = {"sample": "textfile", "filename": "filename", "concept": "instanceprompt"}.get(source, "textfile")
    entry |= {"caption_strategy": ours, "caption_lines": "choose"}
    if source != "concept":
        own.decide("text.prompt_source", "translated", ours=f"caption_strategy: {ours}", text="")
        if own.has("text.prompt_path"):
            own.decide("text.prompt_path", "no effect", text="Not read with this prompt_source.")
        return
    path = Path(place.path(own.text("text.prompt_path")))
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()] if path.is_file() else []
    entry["instance_prompt"] = lines[0] if lines else "set the caption of the concept"
    exact = len(lines) == 1
    text = "" if exact else own.rows["text.prompt_path"].text
    for key in ("text.prompt_source", "text.prompt_path"):
        own.decide(
            key,
            "translated" if exact else "approximate",
            ours=f"instance_prompt: {entry['instance_prompt']}",
            text=text,
        )
    if not lines:
        own.draft.to_do.append(f"Set instance_prompt of {entry['instance_data_dir']}: {path} is not here.")


def _length(settings: Settings, draws: Sequence[Draws] | None) -> None:
    """max_train_steps by OneTrainer's arithmetic; num_train_epochs if the images are not at hand."""
    draft, epochs = settings.draft, settings.whole("epochs")
    batch, accumulation = (
        max(1, settings.whole("batch_size", 1)),
        max(1, settings.whole("gradient_accumulation_steps", 1)),
    )
    batches = full_batches(draws or (), batch)
    if not batches:
        text = "The images are not here: an epoch may have other buckets, and steps, than with OneTrainer."
        settings.put("epochs", "num_train_epochs", epochs, outcome="approximate", text=text)
        if draws is not None:
            draft.to_do.append(f"No bucket has {counted(batch, 'image')}: OneTrainer would train nothing.")
        return
    steps = max(1, epochs * batches // accumulation)
    images = sum(draw.number for draw in draws or ())
    joined = f", {accumulation} to a step" if accumulation > 1 else ""
    epoch = (
        f"an epoch has {counted(batches, 'whole batch', 'whole batches')} of its {counted(images, 'image')}"
    )
    formula = f"{epoch}{joined}; {epochs} epochs are {steps:,} steps"
    draft.set_length(Length(steps, steps * accumulation * batch, max(1, batches // accumulation), formula))
    settings.put(
        "epochs", "max_train_steps", steps, text=f"{epochs} epochs of {counted(batches, 'batch', 'batches')}."
    )


def list_of(settings: Settings, key: str, place: Place) -> list[JsonValue]:
    """The content of a file that a key names; an empty list if it is not here."""
    path = Path(place.path(settings.text(key)))
    content = read_structured(path) if settings.text(key) and path.is_file() else []
    return content if isinstance(content, list) else []
