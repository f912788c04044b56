"""Header entries by which other programs label an adapter file: ModelSpec's, and the ss_ ones of trainers.

Sources: Stability AI's ModelSpec 1.0.0; the keys and values that kohya's scripts, ai-toolkit and musubi-tuner
write, and that AUTOMATIC1111, SwarmUI, InvokeAI and LoRA managers read.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from simpletuner.helpers.configuration.loading.rules import training_size
from simpletuner.helpers.configuration.schema.adapter import CHANGE_THE_BASE
from simpletuner.helpers.configuration.schema.datasets import subjects_of
from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.contracts import ModelSpec, Sample
from simpletuner.helpers.io.redaction import redacted

SPECIFICATION = "modelspec.sai_model_spec"
HASH = "modelspec.hash_sha256"
IMPLEMENTATION = "modelspec.implementation"
ARCHITECTURE = "modelspec.architecture"
TITLE = "modelspec.title"
TRIGGERS, USAGE = "modelspec.trigger_phrase", "modelspec.usage_hint"
PREFIXES = ("modelspec.", "ss_")
VERSION = "1.0.0"
DIFFUSERS = "diffusers"
LYCORIS_MODULE, LORA_MODULE = "lycoris.kohya", "networks.lora"
MIXED = "Dynamic"
"""Of a rank or alpha that differs from layer to layer, as kohya's tools write it."""
REPRODUCIBLE_DATE = "SOURCE_DATE_EPOCH"
MOST_TAGS = 200
LONGEST_TAG_WORDS = 4
SHARE_OF_TAGS = 0.9
"""Of captions that are lists of tags; with fewer, none is counted."""
_SENTENCE = re.compile(r"[.!?;:]\s|[.!?;:]$")


def labels_of_run(
    config: RunConfig, spec: ModelSpec, *, samples: Sequence[Sample], prediction_type: str | None
) -> dict[str, str]:
    """Labels of a run's adapter file, without a path or the name of an image.

    Args:
        config: The run.
        spec: Its family.
        samples: Its images, whose captions are counted if they are tags.
        prediction_type: Of the denoiser, where it is known.
    """
    subjects = {each.id: each.instance_prompt for each in subjects_of(config.datasets)}
    triggers = sorted({prompt for prompt in subjects.values() if prompt})
    trained = [sample for sample in samples if sample.dataset_id in subjects]
    return {
        key: str(value)
        for key, value in {
            **_specification(config, spec, triggers=triggers, prediction_type=prediction_type),
            **_trainer_labels(config),
            "ss_num_train_images": len(trained),
            "ss_num_reg_images": len(samples) - len(trained) or None,
            "ss_tag_frequency": _as_json(tag_counts(trained, triggers=triggers)),
            "ss_v_parameterization": True if prediction_type == "v_prediction" else None,
            "ss_zero_terminal_snr": config.model.rescale_betas_zero_snr or None,
        }.items()
        if value not in (None, "")
    }


def labels_of_export(
    stored: Mapping[str, str],
    spec: ModelSpec,
    *,
    keeps_names: bool,
    ranks: Iterable[int],
    alphas: Iterable[float],
    has_other_layers: bool,
) -> dict[str, str]:
    """Labels of an export that differ from those of its adapter file.

    Args:
        stored: Header of the adapter file; without labels the export gets none.
        spec: The family.
        keeps_names: Whether the layers keep their names in diffusers.
        ranks: Rank of each LoRA layer.
        alphas: Alpha of each LoRA layer.
        has_other_layers: Whether some layers are no LoRA.
    """
    if SPECIFICATION not in stored:
        return {}
    original = DIFFUSERS if keeps_names or spec.original_code is None else spec.original_code
    labels = {IMPLEMENTATION: original, "ss_network_dim": _common(ranks), "ss_network_alpha": _common(alphas)}
    if has_other_layers:
        return {IMPLEMENTATION: original}
    return labels | {"ss_network_module": LORA_MODULE, "ss_network_args": "{}"}


def labels_of_tlora(
    stored: Mapping[str, str], *, ranks: Iterable[int], alphas: Iterable[float]
) -> dict[str, str]:
    """Labels of a T-LoRA made of other files.

    Args:
        stored: Header that it gets; without labels it gets none.
        ranks: Rank of each layer.
        alphas: Alpha of each layer.
    """
    if SPECIFICATION not in stored:
        return {}
    return {
        IMPLEMENTATION: DIFFUSERS,
        "ss_network_module": LYCORIS_MODULE,
        "ss_network_args": json.dumps({"algo": "tlora"}),
        "ss_network_dim": _common(ranks),
        "ss_network_alpha": _common(alphas),
    }


def labels_of_extract(spec: ModelSpec, base: str) -> dict[str, str]:
    """Labels of a LoRA that is the difference of two models.

    Args:
        spec: The family.
        base: Repository, folder or file of the base model.
    """
    known = spec.labels.get(spec.flavour_of(base) or "")
    if known is None:
        return {}
    return {
        SPECIFICATION: VERSION,
        ARCHITECTURE: f"{known.architecture}/lora",
        "ss_base_model_version": known.version,
    }


def usage_hint(phrase: str) -> str:
    """How a trigger phrase is used."""
    return f"Trigger words: {phrase}"


def tag_counts(samples: Sequence[Sample], *, triggers: Sequence[str] = ()) -> dict[str, int]:
    """Tag -> number of captions with it, the most frequent first; {} unless the captions are tags.

    A caption that repeats its file's name is not counted.
    """
    captions = [redacted(each.caption) for each in samples if each.caption and not _is_file_name(each)]
    lists = [tags for caption in captions if (tags := _tags(caption, triggers=triggers))]
    if not lists or len(lists) < SHARE_OF_TAGS * len(captions):
        return {}
    counts = Counter(tag for tags in lists for tag in dict.fromkeys(tags))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS])


def _specification(
    config: RunConfig, spec: ModelSpec, *, triggers: Sequence[str], prediction_type: str | None
) -> dict[str, object]:
    # By the repository: another model may stand beside model_flavour.
    flavour = spec.flavour_of(config.model.pretrained_model_name_or_path) or ""
    labels, licence = spec.labels.get(flavour), spec.licences.get(flavour)
    if labels is None:
        return {}
    size = training_size(config.data, spec)
    phrase = ", ".join(triggers)
    return {
        SPECIFICATION: VERSION,
        ARCHITECTURE: f"{labels.architecture}/lora",
        IMPLEMENTATION: DIFFUSERS,
        TITLE: config.title,
        "modelspec.description": config.publishing.model_card_note,
        "modelspec.date": _date(),
        "modelspec.resolution": size,
        TRIGGERS: phrase,
        USAGE: usage_hint(phrase) if phrase else None,
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction_type or ""),
        "modelspec.license": None if licence is None else licence.name or licence.identifier,
        "ss_base_model_version": labels.version,
        "ss_resolution": f"({size.width}, {size.height})",
    }


def _trainer_labels(config: RunConfig) -> dict[str, object]:
    lycoris = config.lycoris
    model = config.model.pretrained_model_name_or_path
    # The file holds the scale in its factors, and the start of such an initialisation in ranks of its own.
    rank = config.adapter.lora_rank * (2 if config.adapter.lora_init_type in CHANGE_THE_BASE else 1)
    network: dict[str, object] = {"ss_network_dim": rank, "ss_network_alpha": rank}
    if lycoris is not None:
        network = {
            "ss_network_module": LYCORIS_MODULE,
            "ss_network_args": json.dumps({"algo": lycoris.algo}),
            "ss_network_dim": lycoris.linear_dim,
            "ss_network_alpha": f"{lycoris.linear_alpha * lycoris.multiplier:g}",
        }
    return {
        **network,
        "ss_output_name": config.title,
        "ss_sd_model_name": Path(redacted(model)).name if Path(model).is_absolute() else model,
        "ss_optimizer": config.optimizer.optimizer,
        "ss_learning_rate": config.optimizer.learning_rate,
        "ss_lr_scheduler": config.optimizer.lr_scheduler,
        "ss_seed": config.training.seed,
        "ss_mixed_precision": config.precision.mixed_precision,
    }


def _date() -> str | None:
    """Only a date that is given: an equal run writes equal files."""
    seconds = os.environ.get(REPRODUCIBLE_DATE, "")
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d") if seconds.isdecimal() else None


def _as_json(counts: Mapping[str, int]) -> str | None:
    return json.dumps({"training": counts}, ensure_ascii=False) if counts else None


def _tags(caption: str, *, triggers: Sequence[str]) -> list[str]:
    """The tags of a caption; [] for sentences and for a single phrase that is no trigger."""
    tags = [part.strip() for part in caption.split(",") if part.strip()]
    are_short = all(len(tag.split()) <= LONGEST_TAG_WORDS and not _SENTENCE.search(tag) for tag in tags)
    return tags if are_short and (len(tags) > 1 or caption.strip() in triggers) else []


def _is_file_name(sample: Sample) -> bool:
    return _letters(sample.caption) == _letters(Path(sample.path).stem)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def _common(values: Iterable[float]) -> str:
    found = {f"{value:g}" for value in values}
    return found.pop() if len(found) == 1 else MIXED
