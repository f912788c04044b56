"""What `simpletuner init` shows: the plan of a new run, and the presets with their estimated memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.cells import set_cell_size

import simpletuner
from simpletuner.helpers.choices.precisions import UNCHANGED
from simpletuner.helpers.configuration.finding import FILE
from simpletuner.helpers.configuration.load import load_config
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec
from simpletuner.helpers.estimating.cards import EFFICIENCY
from simpletuner.helpers.estimating.disk import GIB
from simpletuner.helpers.estimating.estimate import estimate
from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.new_run.answers import Answers, Images
from simpletuner.helpers.new_run.presets import CARDS, NO_CARD, PURPOSES, Model, Purpose, models, nearest
from simpletuner.helpers.new_run.texts import Texts
from simpletuner.helpers.new_run.timing import minutes_on
from simpletuner.helpers.new_run.writing import PARTS, Written, settings_of

_LABEL_CELLS = 14
EXAMPLE_IMAGES = Path(simpletuner.__file__).parent / "demo" / "photo"


def plan(answers: Answers, written: Written, texts: Texts) -> Iterator[str]:
    """Lines on a new configuration: what is trained, on what, for how long, in how much memory."""
    settings = answers.model.settings(answers.purpose, answers.card)
    images, steps = answers.images, answers.steps
    title, batch = answers.model.title, settings["train_batch_size"]
    lycoris = answers.preset.lycoris
    both = len(lycoris["apply_preset"]["target_module"]) > 1
    rows = [
        (
            "row_model",
            texts(
                "model_line",
                title=title,
                resolution=settings["resolution"],
                precision=_precision(settings, texts),
            ),
        ),
        (
            "row_adapter",
            texts(
                "adapter_line",
                rank=lycoris["linear_dim"],
                min_rank=lycoris["tlora_min_rank"],
                layers=texts("layers_both" if both else "layers_attention"),
            ),
        ),
        (
            "row_images",
            texts(
                "images_line_below" if images.num_below else "images_line",
                count=images.count,
                folder=printable(str(images.folder)),
                below=images.num_below,
            ),
        ),
        (
            "row_caption",
            texts(
                "caption_files_line" if images.captions else "caption_line",
                caption=answers.caption,
                captioned=len(images.captions),
                count=images.count,
            ),
        ),
        (
            "row_steps",
            texts(
                "steps_line",
                steps=steps,
                batch=batch,
                passes=round(steps * batch / images.count),
                interval=steps // PARTS,
            ),
        ),
        ("row_memory", _memory(answers, written, texts)),
        ("row_writes", texts("writes_line", folder=answers.folder, output=answers.output)),
    ]
    minutes = minutes_on(answers.card_name, written.estimate, steps=steps)
    if minutes is not None:
        share = round(100 * EFFICIENCY)
        time = texts("time_line", minutes=minutes, card=answers.card_name, efficiency=share)
        rows.append(("row_time", time))
    rows += [("row_note", note) for note in _notes(answers, texts)]
    rows += [("row_warning", warning) for warning in written.warnings]
    for key, text in rows:
        yield f"  {set_cell_size(texts(key), _LABEL_CELLS)}{text}"


def _notes(answers: Answers, texts: Texts) -> Iterator[str]:
    """What the person may want to change."""
    images, trigger = answers.images, answers.trigger
    if answers.model.reads_latin_only and not trigger.isascii():
        yield texts("latin_note", title=answers.model.title, trigger=trigger)
    if images.captions and (uncaptioned := images.count - len(images.captions)):
        yield texts("uncaptioned_note", count=uncaptioned, caption=answers.caption)
    if without := sum(trigger not in each for each in images.captions):
        yield texts("trigger_note", count=without, trigger=trigger)


def _precision(settings: Mapping[str, object], texts: Texts) -> str:
    named = str(settings.get("base_model_precision", UNCHANGED))
    if named == UNCHANGED:
        is_float32 = settings["mixed_precision"] == "no"
        named = texts("precision_no_change_cpu" if is_float32 else "precision_no_change")
    return named + (texts("offload") if settings.get("enable_group_offload") else "")


def _memory(answers: Answers, written: Written, texts: Texts) -> str:
    if answers.card == NO_CARD:
        return texts("memory_line_cpu")
    memory = f"{answers.memory:g}"
    if written.estimate is None:
        return texts("memory_line_unknown", memory=memory)
    return texts("memory_line", peak=f"{written.estimate.peak_device_bytes / GIB:.1f}", memory=memory)


def preset_lines(texts: Texts, *, specs: Mapping[str, ModelSpec]) -> Iterator[str]:
    """A table of all presets: model and purpose, memory of the card, estimated peak and settings."""
    yield texts("presets_head")
    for model in models().values():
        if model.smallest == NO_CARD:
            continue
        for purpose in PURPOSES:
            yield ""
            yield f"{model.name}, {purpose}"
            for card in CARDS:
                label = set_cell_size(texts("presets_for", memory=card), _LABEL_CELLS)
                yield f"  {label}{_preset(model, purpose, card, texts=texts, specs=specs)}"


def _preset(
    model: Model, purpose: Purpose, memory: int, *, texts: Texts, specs: Mapping[str, ModelSpec]
) -> str:
    card = model.card_for(memory)
    if card is None:
        return texts("presets_nearest", nearest=nearest(model, memory))
    settings = model.settings(purpose, card)
    found = estimate(run_of(model, purpose, card, specs=specs))
    shown = "?" if found is None else f"{found.peak_device_bytes / GIB:.1f}"
    return f"{shown:>5}  {settings['resolution']} px, {_precision(settings, texts)}"


def run_of(model: Model, purpose: Purpose, card: int, *, specs: Mapping[str, ModelSpec]) -> RunConfig:
    """The run of a preset, on an example's image."""
    answers = Answers(
        images=Images(EXAMPLE_IMAGES, 1, 0, ()),
        purpose=purpose,
        trigger="sks",
        model=model,
        memory=card,
        card=card,
        time="usual",
        name=f"{model.name}-{purpose}-{card}gb",
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in settings_of(answers).items():
            write_json(folder / file, content)
        return load_config(folder / FILE, families=specs)
