"""What a run knows about itself when it begins; kept in its folder, for the page and for later."""

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
from simpletuner.helpers.configuration.text.problems import without

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from simpletuner.helpers.adapters.adapter import Adapter
    from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
    from simpletuner.helpers.configuration.schema.sections import RunConfig
    from simpletuner.helpers.contracts import ModelSpec, Sample
    from simpletuner.helpers.data.dataset import TrainingData
    from simpletuner.helpers.training.trainer import Trainer
    from simpletuner.helpers.training.validation import Validation

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


def build_manifest(trainer: Trainer) -> dict[str, Any]:
    """What the other files of a run do not say, as json; no environment variable's value is in it."""
    config = trainer.config
    manifest = {
        "version": 1,
        "max_steps": trainer.max_steps,
        "changed_keys": changed_keys(config, trainer.family.spec),
        "adapter": _adapter(trainer.adapter),
        "datasets": [_dataset(each, trainer.data) for each in config.datasets],
        "environment": _environment(trainer.accelerator.device, trainer.accelerator.num_processes),
        **_pictures(trainer.validation),
    }
    hidden: Any = without(manifest, config.hidden)
    return dict(hidden)


def changed_keys(config: RunConfig, spec: ModelSpec) -> list[str]:
    """The keys of config.json whose value is neither the default nor what the family puts in its place."""
    own = family_defaults({}, spec)
    sections = [section for _, section in config if isinstance(section, Section)]
    changed = {key for section in sections for key in _changed(section, own)}
    return sorted(changed & config.resolved().keys())


def rank_curve(schedule: Mapping[str, object]) -> list[tuple[int, int]]:
    """(timestep, open rank) wherever a schedule, as adapter files state it, changes its rank."""
    ranks = RankSchedule.from_config(schedule)
    course = [(timestep, ranks.rank_at(timestep)) for timestep in range(ranks.num_timesteps + 1)]
    return [
        each
        for before, each in zip([(0, -1), *course], course, strict=False)
        if before[1] != each[1] or each is course[-1]
    ]


def _changed(section: Section, own: Mapping[str, object]) -> Iterable[str]:
    values = dict(section)
    for name, field in type(section).model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data=values)
        if field.is_required() or values[name] not in (default, own.get(name, default)):
            yield name


def _adapter(adapter: Adapter) -> dict[str, Any]:
    schedule = adapter.tlora_config
    return {
        "kind": adapter.algorithm,
        "layers": adapter.num_layers,
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "schedule": schedule,
        "ranks": None if schedule is None else rank_curve(schedule),
    }


def _dataset(config: DatasetConfig, data: TrainingData) -> dict[str, Any]:
    samples = [sample for sample in data.samples if sample.dataset_id == config.id]
    skipped = [each for each in data.skipped if each.dataset_id == config.id]
    sizes = Counter(sample.target_px for sample in samples)
    originals = sorted({sample.original_px for sample in samples}, key=lambda size: size.height * size.width)
    return {
        "id": config.id,
        "folder": str(config.instance_data_dir),
        "images": len(samples),
        "without_caption": sum(not sample.caption for sample in samples),
        "distinct_captions": len({sample.caption for sample in samples if sample.caption}),
        "buckets": {str(size): count for size, count in sorted(sizes.items())},
        "originals": [str(size) for size in originals[:: max(len(originals) - 1, 1)]],
        "captions": [[sample.path, sample.caption] for sample in _examples(samples)],
        "num_skipped": len(skipped),
        "skipped": [[each.path, each.reason] for each in skipped[:NUM_SKIPPED]],
    }


def _examples(samples: Sequence[Sample]) -> list[Sample]:
    """A few samples whose captions differ."""
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


def _pictures(validation: Validation) -> dict[str, Any]:
    """Which pictures the run makes, and the files of those that no training changes."""
    sampler, other = validation.sampler, validation.comparison
    return {
        "compared_with": None if other is None else other.title,
        "shots": [
            {
                "name": shot.name,
                "prompt": shot.prompt,
                "size": str(shot.size),
                "seed": shot.seed,
                "strength": shot.strength,
                "base": None if sampler.config.disable_benchmark else sampler.cached_path(shot).name,
                "other": None if other is None else other.picture(shot).name,
            }
            for shot in sampler.shots
        ],
    }
