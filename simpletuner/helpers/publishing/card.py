"""The model card of a run: a README with the front matter that the hub reads, and the images beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from simpletuner import __version__
from simpletuner.helpers.adapters.files import comfyui
from simpletuner.helpers.adapters.tlora.rank_schedule import SCHEDULE_KEY, RankSchedule
from simpletuner.helpers.choices.algorithms import STANDARD, display_name_of
from simpletuner.helpers.contracts import Licence, ModelSpec
from simpletuner.helpers.errors import PublishError
from simpletuner.helpers.io.atomic import link_or_copy, write_text
from simpletuner.helpers.io.names import counted
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.io.run_folder import (
    CARD_FILE,
    CARD_FOLDER,
    CARD_IMAGES_FOLDER,
    COMFYUI_FILE,
    GRID_FILE,
)
from simpletuner.helpers.io.safetensors_file import read_header
from simpletuner.helpers.publishing.markdown import escape, fenced, table
from simpletuner.helpers.publishing.run_files import RunFiles, read_run
from simpletuner.helpers.publishing.usage import (
    WeightFiles,
    diffusers_code,
    export_command,
    pipeline_code,
    sample_command,
    teaches,
    whole_model_code,
)

logger = logging.getLogger(__name__)

MOST_IMAGES = 12
SHOWN_TIMESTEPS = 4
"""Equal parts of the timesteps, at whose edges the table has the active rank."""
EXPORTED = ("tlora", "lora", STANDARD.name)
"""Algorithms that `simpletuner export` converts for diffusers."""
LOCAL_MODEL = "path/to/the/base/model"
STANDARD_SETTINGS = ("lora_rank", "lora_alpha", "lora_init_type", "use_dora", "use_rslora")
SETTINGS = (
    *("model_family", "model_flavour", "lora_type", *STANDARD_SETTINGS),
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "train_batch_size"),
    *("gradient_accumulation_steps", "mixed_precision", "base_model_precision", "resolution"),
    *("resolution_type", "snr_gamma", "flow_schedule_shift", "flow_schedule_auto_shift"),
    *("placeholder_token", "initializer_token", "num_vectors", "embedding_lr"),
    *("caption_dropout_probability", "seed"),
)
LYCORIS_SETTINGS = (
    *("algo", "linear_dim", "linear_alpha", "tlora_min_rank", "tlora_alpha", "tlora_schedule"),
    "tlora_scale",
    *("tlora_init", "sig_type"),
)
_MARKER = re.compile(r"<!-- Written by SimpleTuner-T [^;]*; checksum ([0-9a-f]{64}) -->\n\Z")


def write_card(folder: Path, *, families: Mapping[str, ModelSpec], repository: str | None = None) -> Path:
    """Write the model card of a run and its images; a card that somebody edited stays.

    Args:
        folder: The output folder.
        families: Name -> spec of every model family.
        repository: The hub's repository that holds the adapter, owner/name, where there is one.

    Returns:
        The card.

    Raises:
        PublishError: The folder is no output folder of a run, or the run has saved no adapter.
        StorageError: A file cannot be written.
    """
    run = read_run(folder)
    card = folder / CARD_FOLDER / CARD_FILE
    if card.exists() and not is_own(card.read_text(encoding="utf-8", errors="replace")):
        logger.info("%s was edited and stays as it is. Remove it to have it written anew.", card)
        return card
    for name, file in card_images(run).items():
        link_or_copy(file, card.parent / name)
    write_text(card, with_marker(card_text(run, families=families, repository=repository)))
    return card


def card_images(run: RunFiles) -> dict[str, Path]:
    """Path beside the card -> image; the first prompts, and the grid of all."""
    images = {
        f"{CARD_IMAGES_FOLDER}/{index:02d}.png": file
        for index, (_, file) in enumerate(run.images[:MOST_IMAGES])
    }
    grid = list(run.grids.values())[-1:]
    return images | {f"{CARD_IMAGES_FOLDER}/{GRID_FILE}": file for file in grid}


def card_text(run: RunFiles, *, families: Mapping[str, ModelSpec], repository: str | None) -> str:
    """The card without its marker."""
    spec = families.get(str(run.config.get("model_family")))
    front = yaml.safe_dump(
        front_matter(run, spec), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    parts = [
        f"---\n{front}---",
        f"# {escape(_title(run, repository))}",
        str(run.config.get("model_card_note") or ""),
        _summary(run),
        _licence_text(run, spec),
        *_sections(run, spec, repository=repository),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def front_matter(run: RunFiles, spec: ModelSpec | None) -> dict[str, Any]:
    """The metadata that the hub reads."""
    model, licence = base_model(run), _licence(run, spec)
    triggers = _triggers(run)
    is_safe = bool(run.config.get("model_card_safe_for_work"))
    kind = ["lora", "template:diffusion-lora", _algorithm(run)] if run.has_adapter else []
    kind += ["full-fine-tune"] if run.model is not None else []
    kind += ["textual_inversion"] if run.embedding is not None else []
    tags = ["text-to-image", "diffusers", *kind, "simpletuner-t"]
    found = {
        "base_model": model,
        "base_model_relation": ("adapter" if run.model is None else "finetune") if model else None,
        "library_name": "diffusers",
        "license": licence.identifier if licence else None,
        "license_name": licence.name if licence else None,
        "license_link": licence.link if licence else None,
        "pipeline_tag": "text-to-image",
        "instance_prompt": triggers[0] if triggers else None,
        "tags": list(dict.fromkeys([*tags, str(run.config.get("model_family"))]))
        + ([] if is_safe else ["not-for-all-audiences"]),
        "widget": [
            {"text": str(prompt.get("prompt") or "-"), "output": {"url": name}}
            for (prompt, _), name in zip(run.images, card_images(run), strict=False)
        ],
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def base_model(run: RunFiles) -> str | None:
    """Repository of the base model; None for a folder or a file."""
    name = str(run.config.get("pretrained_model_name_or_path") or "")
    return name if name.count("/") == 1 else None


def with_marker(text: str) -> str:
    """A card with the checksum by which its writer knows it again."""
    return f"{text}\n<!-- Written by SimpleTuner-T {__version__}; checksum {_digest(text)} -->\n"


def is_own(text: str) -> bool:
    """Whether a card is as it was written."""
    match = _MARKER.search(text)
    return match is not None and _digest(text[: match.start() - 1]) == match[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _sections(run: RunFiles, spec: ModelSpec | None, *, repository: str | None) -> Iterator[str]:
    if triggers := _triggers(run):
        yield "## Trigger words\n\n" + "\n".join(f"- {escape(each)}" for each in triggers)
    if run.embedding_name is not None:
        token = escape(run.config.get("placeholder_token"))
        yield f"## New token\n\n{token} is a word in prompts, whose embeddings `{run.embedding_name}` has."
    if run.images:
        yield f"## Images\n\n{_gallery(run)}"
    if ranks := _rank_table(run):
        yield f"## Rank schedule\n\n{ranks}"
    yield f"## Settings\n\n{_settings(run)}"
    if run.ema_sentence:
        yield f"## Files\n\n{run.ema_sentence}"
    yield "\n\n".join(["## Use", *_usage(run, spec, repository=repository)])


def _title(run: RunFiles, repository: str | None) -> str:
    folder = Path(redacted(str(run.folder)))
    names = [redacted(repository or "").rpartition("/")[2], run.config.get("tracker_run_name"), folder.name]
    return redacted(str(next(name for name in names if name)))


def _summary(run: RunFiles) -> str:
    model = base_model(run)
    base = f"[{escape(model)}](https://huggingface.co/{model})" if model else "a local base model"
    steps = run.header.get("steps")
    trained = f" for {counted(int(steps), 'step')}" if steps and steps.isdecimal() else ""
    if run.model is not None:
        return f"A full fine-tune of the denoiser of {base}, trained{trained} with SimpleTuner-T."
    if not run.has_adapter:
        return f"A new token (textual inversion) for {base}, trained{trained} with SimpleTuner-T."
    algorithm = escape(display_name_of(_algorithm(run)))
    return f"An adapter ({algorithm}) for {base}, trained{trained} with SimpleTuner-T."


def _licence(run: RunFiles, spec: ModelSpec | None) -> Licence | None:
    model = base_model(run)
    flavour = spec.flavour_of(model) if spec is not None and model is not None else None
    return spec.licences.get(flavour) if spec is not None and flavour is not None else None


def _licence_text(run: RunFiles, spec: ModelSpec | None) -> str:
    licence = _licence(run, spec)
    if licence is None:
        return "Licence: see the base model."
    name = escape(licence.name or licence.identifier)
    named = f"[{name}]({licence.link})" if licence.link else name
    return f"Licence: that of the base model, {named}."


def _triggers(run: RunFiles) -> list[str]:
    datasets = run.config.get("data_backend_config") or []
    subjects = [each for each in datasets if isinstance(each, Mapping) and teaches(each)]
    found = [each.get("instance_prompt") for each in subjects]
    return sorted({str(each) for each in found if each})


def _algorithm(run: RunFiles) -> str:
    lycoris = run.config.get("lycoris_config")
    return str(lycoris.get("algo", "lora")) if isinstance(lycoris, Mapping) else STANDARD.name


def _gallery(run: RunFiles) -> str:
    rows = []
    for (prompt, _), name in zip(run.images, card_images(run), strict=False):
        facts = f"{prompt.get('size', '')}, seed {prompt.get('seed', '')}"
        if (strength := prompt.get("strength", 1)) != 1:
            facts += f", strength {strength:g}"
        rows.append(f"| ![]({name}) | {escape(prompt.get('prompt') or '(no prompt)')} | {escape(facts)} |")
    head = "| image | prompt | size and seed |\n| --- | --- | --- |\n"
    return head + "\n".join(rows) + f"\n\n![]({CARD_IMAGES_FOLDER}/{GRID_FILE})"


def _rank_table(run: RunFiles) -> str:
    if SCHEDULE_KEY not in run.header:
        return ""
    schedule = RankSchedule.from_config(json.loads(run.header[SCHEDULE_KEY]))
    last = schedule.num_timesteps
    timesteps = [round(last * part / SHOWN_TIMESTEPS) for part in range(SHOWN_TIMESTEPS + 1)]
    columns = ["timestep", *map(str, timesteps)]
    ranks = table(columns, [["active rank", *(schedule.rank_at(timestep) for timestep in timesteps)]])
    return f"Few ranks are active where there is much noise; timestep {last} is noise alone.\n\n{ranks}"


def _settings(run: RunFiles) -> str:
    keys = [key for key in SETTINGS if run.embedding is not None or key != "num_vectors"]
    rows: list[tuple[str, object]] = [(key, run.config.get(key)) for key in keys]
    lycoris = run.config.get("lycoris_config")
    if not run.has_adapter:
        rows = [(key, value) for key, value in rows if key not in (*STANDARD_SETTINGS, "lora_type")]
    elif isinstance(lycoris, Mapping):
        rows = [(key, value) for key, value in rows if key not in STANDARD_SETTINGS]
        rows += [(key, lycoris.get(key)) for key in LYCORIS_SETTINGS]
    rows.append(("training images", run.header.get("ss_num_train_images")))
    return table(["setting", "value"], [row for row in rows if row[1] not in (None, "", False)])


def _usage(run: RunFiles, spec: ModelSpec | None, *, repository: str | None) -> Iterator[str]:
    model, name = base_model(run), run.adapter_name
    if run.model is not None:
        yield "### diffusers"
        source = model or LOCAL_MODEL
        code = whole_model_code(run.config, run.manifest, model=source, folder=name, spec=spec)
        yield fenced(code, "python")
        yield "### ComfyUI"
        yield "This writes a file for the folder `models/diffusion_models` and the node Load Diffusion Model:"
        yield fenced(export_command(name), "bash")
        return
    yield "### SimpleTuner-T"
    if repository is not None:
        names = " ".join(map(shlex.quote, dict.fromkeys(filter(None, (name, run.embedding_name)))))
        yield fenced(f"hf download {shlex.quote(repository)} {names} --local-dir .", "bash")
    given = None if model else LOCAL_MODEL
    command = sample_command(run.config, run.manifest, adapter=name, model=given)
    yield fenced(command, "bash")
    yield "In Python:"
    files = _expressions(run)
    code = pipeline_code(run.config, run.manifest, model=model or LOCAL_MODEL, files=files, spec=spec)
    yield fenced(code, "python")
    yield "### diffusers"
    yield from _in_diffusers(run, spec, repository=repository)
    yield "### ComfyUI"
    exported = None if run.comfyui is None else Path(COMFYUI_FILE)
    shapes = read_header(run.adapter, error=PublishError)
    yield f"ComfyUI: {comfyui.advice(shapes, file=Path(name), exported=exported)}."
    if run.has_adapter and run.embedding_name is not None:
        file = Path(run.embedding_name)
        yield f"It reads `{file}` in models/embeddings, as `embedding:{file.stem}` in a prompt."


def _expressions(run: RunFiles) -> WeightFiles:
    """The files of a run by their names in a repository, as Python writes them."""
    embedding = None if run.embedding_name is None else repr(run.embedding_name)
    return WeightFiles(adapter=repr(run.adapter_name) if run.has_adapter else None, embedding=embedding)


def _in_diffusers(run: RunFiles, spec: ModelSpec | None, *, repository: str | None) -> Iterator[str]:
    model, name = base_model(run) or LOCAL_MODEL, run.adapter_name
    if _algorithm(run) == STANDARD.name:
        source = repository or "."
        files = _expressions(run)
        code = diffusers_code(run.config, run.manifest, model=model, source=source, files=files, spec=spec)
        yield fenced(code, "python")
        return
    yield "diffusers alone does not read this file; the code above loads it into a pipeline of diffusers."
    if _algorithm(run) in EXPORTED:
        yield (
            f"`simpletuner export {name} --output lora.safetensors` writes a LoRA with every rank active, "
            "which `pipeline.load_lora_weights` reads."
        )
