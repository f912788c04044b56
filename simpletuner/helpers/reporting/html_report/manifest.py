"""Run information for the report, collected when training starts."""

from __future__ import annotations

import os
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from simpletuner import __version__
from simpletuner.helpers.adapters.tlora.rank_schedule import RankSchedule
from simpletuner.helpers.configuration.loading.rules import family_defaults
from simpletuner.helpers.configuration.schema.base import Section
from simpletuner.helpers.io.redaction import redacted_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from simpletuner.helpers.adapters.trainable import Trainable
    from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import ModelSpec, Sample
    from simpletuner.helpers.data.dataset import TrainingData

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "lycoris-lora",
    "peft",
    "safetensors",
    "pillow",
    "numpy",
)
NUM_CAPTIONS = 5
NUM_SKIPPED = 50


def build_manifest(
    *,
    config: RunConfig,
    spec: ModelSpec,
    trainable: Trainable,
    data: TrainingData,
    images: Mapping[str, Any],
    max_steps: int,
    device: torch.device,
    num_processes: int,
) -> dict[str, Any]:
    """Run information for the report, as JSON; texts of the configuration are redacted.

    `images` is the part on validation images, keys compared_with and shots.
    """
    return {
        "version": 1,
        "max_steps": max_steps,
        "changed_keys": changed_keys(config, spec),
        "adapter": _adapter(trainable),
        "datasets": [redacted_json(_dataset(each, data)) for each in config.datasets],
        "environment": _environment(device, num_processes),
        **images,
    }


def changed_keys(config: RunConfig, spec: ModelSpec) -> list[str]:
    """Keys of config.json whose value is neither the default nor the family's default."""
    own = family_defaults({}, spec)
    sections = [section for _, section in config if isinstance(section, Section)]
    changed = {key for section in sections for key in _changed(section, own)}
    return sorted(changed & config.resolved().keys())


def rank_curve(schedule: Mapping[str, object]) -> list[tuple[int, int]]:
    """(timestep, active rank) at each change of a schedule, which is as in adapter files, and at its end."""
    ranks = RankSchedule.from_config(schedule)
    curve = [(timestep, ranks.rank_at(timestep)) for timestep in range(ranks.num_timesteps + 1)]
    return [
        point
        for previous, point in zip([(0, -1), *curve], curve, strict=False)
        if previous[1] != point[1] or point is curve[-1]
    ]


def _changed(section: Section, own: Mapping[str, object]) -> Iterable[str]:
    values = dict(section)
    for name, field in type(section).model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data=values)
        if field.is_required() or values[name] not in (default, own.get(name, default)):
            yield name


def _adapter(trainable: Trainable) -> dict[str, Any]:
    schedule = trainable.tlora_config
    return {
        "kind": trainable.algorithm,
        "layers": trainable.num_layers,
        "parameters": sum(parameter.numel() for parameter in trainable.parameters()),
        "schedule": schedule,
        "ranks": None if schedule is None else rank_curve(schedule),
    }


def _dataset(config: DatasetConfig, data: TrainingData) -> dict[str, Any]:
    samples = [sample for sample in data.samples if sample.dataset_id == config.id]
    held_out = [each.sample for each in data.divided.held_out if each.sample.dataset_id == config.id]
    samples += held_out
    skipped = [each for each in data.skipped if each.dataset_id == config.id]
    sizes = Counter(sample.target_px for sample in samples)
    originals = sorted({sample.original_px for sample in samples}, key=lambda size: size.height * size.width)
    return {
        "id": config.id,
        "folder": config.place,
        "images": len(samples),
        "held_out": len(held_out),
        "without_caption": sum(not sample.caption for sample in samples),
        "distinct_captions": len({sample.caption for sample in samples if sample.caption}),
        "buckets": {str(size): count for size, count in sorted(sizes.items())},
        "originals": [str(size) for size in originals[:: max(len(originals) - 1, 1)]],
        "captions": [[sample.path, sample.caption] for sample in _examples(samples)],
        "num_skipped": len(skipped),
        "skipped": [[each.path, each.reason] for each in skipped[:NUM_SKIPPED]],
    }


def _examples(samples: Sequence[Sample]) -> list[Sample]:
    """A few samples with different captions."""
    by_caption = {sample.caption: sample for sample in reversed(samples) if sample.caption}
    return list(reversed(by_caption.values()))[:NUM_CAPTIONS]


def _environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}"
    return {
        "simpletuner": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "CUDA": torch.version.cuda if device.type == "cuda" else None,
        "device": name,
        "processes": num_processes,
        "system": f"{platform.system()} {platform.machine()}",
        "processor cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
