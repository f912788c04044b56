"""Whether a run fits its GPU and its disks, before anything is downloaded or loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from simpletuner.helpers.configuration.schema.sections import RunConfig
from simpletuner.helpers.errors import ConfigError
from simpletuner.helpers.estimating.advice import FITS, suggestions
from simpletuner.helpers.estimating.device_memory import Phase
from simpletuner.helpers.estimating.disk import GIB, disk_problems
from simpletuner.helpers.estimating.estimate import Estimate, estimate
from simpletuner.helpers.models.registry import specs

logger = logging.getLogger(__name__)

REFUSED = 1.3
"""Share of a GPU's memory above which a run ends before its download."""


def check_fit(config: RunConfig, *, memory_bytes: int | None) -> None:
    """Refuse a run that will surely not fit, and warn of one that may not.

    Args:
        config: The run.
        memory_bytes: Of the GPU; None without one.

    Raises:
        ConfigError: The estimate is over 1.3 times the memory, or a disk has too little room; and
            skip_estimate is false.
    """
    found = estimate(config)
    if found is None:
        return
    peak = max(_phases_ahead(config, found), key=lambda phase: phase.num_bytes)
    share = 0 if memory_bytes is None else peak.num_bytes / memory_bytes
    problems = [*_memory_problem(config, peak, memory_bytes=memory_bytes), *disk_problems(found.disk)]
    is_fatal = share > REFUSED or len(problems) > (share > FITS)
    if is_fatal and not config.precision.skip_estimate:
        raise ConfigError(
            f"The run does not fit: {'; '.join(problems)}. simpletuner estimate shows every part. Set "
            "skip_estimate to true to try all the same."
        )
    for problem in problems:
        logger.warning("By the estimate, %s.", problem)


def _phases_ahead(config: RunConfig, found: Estimate) -> list[Phase]:
    """The phases but for those whose caches are there, which load no text encoder and no VAE again."""
    folders = {
        "captions": [config.data.cache_dir_text],
        "latents": [config.data.latents_folder(each) for each in config.datasets],
    }
    is_done = {name: all(map(_has_files, own)) for name, own in folders.items()}
    return [phase for phase in found.phases if not is_done.get(phase.name)]


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _memory_problem(config: RunConfig, phase: Phase, *, memory_bytes: int | None) -> Iterator[str]:
    peak = phase.num_bytes
    if memory_bytes is None or peak <= FITS * memory_bytes:
        return
    changes = suggestions(config, specs()[config.model.model_family], memory_bytes=memory_bytes)
    advice = ", ".join(value for each in changes for value in each.values)
    text = f"it needs about {peak / GIB:.1f} GiB of device memory in {phase.name}, "
    text += f"{peak / memory_bytes:.2f} times the {memory_bytes / GIB:.1f} GiB of this GPU"
    yield f"{text} (what lowers it: {advice})" if advice else text
