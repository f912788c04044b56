"""Checkpoints of a run: save, find, verify, prune, and refuse those of another run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from simpletuner.helpers.errors import CheckpointError, NothingToResumeError
from simpletuner.helpers.io.atomic import (
    JsonValue,
    publish_folder,
    remove_leftovers,
    verify_manifest,
    write_json,
)
from simpletuner.helpers.io.faults import crash_point
from simpletuner.helpers.io.run_folder import (
    COMPATIBILITY_FILE,
    CONFIG_FILE,
    REMOVED_PREFIX,
    checkpoint_folder,
    checkpoint_folders,
)

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import CheckpointConfig

logger = logging.getLogger(__name__)

LATEST = "latest"

Compatibility = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One folder with the state of a run after `step` optimiser steps."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints under one output folder."""

    def __init__(self, config: CheckpointConfig, *, settings: Compatibility, resolved: Compatibility) -> None:
        """Keep checkpoints as `config` says.

        Args:
            config: Where, how often, how many.
            settings: What a run that resumes must share, by the name of its key.
            resolved: The whole configuration, kept beside the state for the reader.
        """
        self._config = config
        self._settings = settings
        self._weights: Compatibility = {}
        self._resolved = resolved
        self._saved_step: int | None = None

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` optimiser steps."""
        return checkpoint_folder(self._config.output_dir, step)

    def clean(self) -> None:
        """Remove what a killed run left half written or half removed; for the holder of the run lock."""
        output_dir = self._config.output_dir
        remove_leftovers(output_dir, of_other_hosts=True)
        for doomed in output_dir.glob(f"{REMOVED_PREFIX}*"):
            shutil.rmtree(doomed)

    def is_due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after this optimiser step."""
        interval = self._config.checkpoint_step_interval
        return interval > 0 and step % interval == 0

    def save(self, step: int, *, write: Callable[[Path], None], publish: bool = True) -> None:
        """Publish `checkpoint-<step>` with what `write` puts into it, then remove those beyond the limit.

        Saving a step again, as at the end of a run, does nothing. A process that does not publish writes all
        the same, because a sharded state is put together by all processes, and lets go of the result.

        Raises:
            CheckpointError: A file cannot be written. Earlier checkpoints are kept.
            StorageError: The same, for lack of space or permission.
        """
        if self._saved_step == step:
            return
        self._saved_step = step
        if not publish:
            with TemporaryDirectory() as scratch:
                write(Path(scratch))
            return
        with publish_folder(self.path(step)) as folder:
            write(folder)
            write_json(folder / COMPATIBILITY_FILE, {"settings": self._settings, "weights": self._weights})
            write_json(folder / CONFIG_FILE, self._resolved)
        logger.info("Saved %s", self.path(step))
        self._prune()

    def find(self) -> Checkpoint | None:
        """The checkpoint `resume_from_checkpoint` asks for, verified and of this run; None to start anew.

        Raises:
            NothingToResumeError: A checkpoint is named that does not exist.
            CheckpointError: The named one is damaged, none of those there is intact, the one found belongs
                to another run, or the run is to start anew on top of earlier checkpoints.
        """
        wanted, existing = self._config.resume_from_checkpoint, list_checkpoints(self._config.output_dir)
        if wanted is None:
            if existing:
                raise CheckpointError(
                    f"{self._config.output_dir} holds {existing[0].path.name} of an earlier run, and "
                    "resume_from_checkpoint is none. Choose another output_dir, or resume from latest."
                )
            return None
        found = self._newest_intact(existing) if wanted == LATEST else self._named(wanted, existing)
        if found is not None:
            check_compatible(found, "settings", self._settings)
            self._saved_step = found.step
        return found

    def set_base_weights(self, weights: Compatibility, *, resumed: Checkpoint | None) -> None:
        """State what the loaded model is, which only the model itself tells.

        Raises:
            CheckpointError: The resumed checkpoint was trained on another one.
        """
        self._weights = weights
        if resumed is not None:
            check_compatible(resumed, "weights", weights)

    def _named(self, name: str, existing: list[Checkpoint]) -> Checkpoint:
        for checkpoint in existing:
            if checkpoint.path.name == Path(name).name:
                problems = verify_manifest(checkpoint.path)
                if problems:
                    raise CheckpointError(
                        f"{checkpoint.path} is damaged: {'; '.join(problems)}. Name another, or latest."
                    )
                if checkpoint is not existing[0]:
                    logger.warning(
                        "%s is newer than %s and stays until this run writes over it; latest takes it.",
                        existing[0].path.name,
                        name,
                    )
                return checkpoint
        there = ", ".join(checkpoint.path.name for checkpoint in existing) or "none"
        raise NothingToResumeError(
            f"resume_from_checkpoint is {name}, which is not in {self._config.output_dir} (there: {there}). "
            "Name one of those, or latest to take the newest or start anew."
        )

    def _newest_intact(self, existing: list[Checkpoint]) -> Checkpoint | None:
        for checkpoint in existing:
            problems = verify_manifest(checkpoint.path)
            if not problems:
                return checkpoint
            logger.warning("Passing over %s: %s.", checkpoint.path, "; ".join(problems))
        if existing:
            raise CheckpointError(
                f"None of the {len(existing)} checkpoints in {self._config.output_dir} is intact. "
                "Move them away to start anew."
            )
        return None

    def _prune(self) -> None:
        limit = self._config.checkpoints_total_limit
        if limit is None:
            return
        for checkpoint in list_checkpoints(self._config.output_dir)[limit:]:
            if checkpoint.step != self._saved_step:
                # Renamed first: a removal that is cut short must not leave half a checkpoint under its name.
                doomed = checkpoint.path.with_name(f"{REMOVED_PREFIX}{checkpoint.path.name}")
                checkpoint.path.rename(doomed)
                crash_point("checkpoint.pruning")
                shutil.rmtree(doomed)


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, newest step first; nothing is verified."""
    return [Checkpoint(path, step) for step, path in reversed(checkpoint_folders(output_dir))]


def check_compatible(checkpoint: Checkpoint, part: str, current: Compatibility) -> None:
    """Compare one part of what a checkpoint states about its run with this run.

    Raises:
        CheckpointError: They differ; the message lists each field.
    """
    try:
        saved = json.loads((checkpoint.path / COMPATIBILITY_FILE).read_bytes())[part]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint.path / COMPATIBILITY_FILE} cannot be read: {error}.") from error
    differences = differing_fields(saved, current)
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} was trained with other settings and cannot be continued:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nRestore these settings, or choose another output_dir to start anew."
        )


def differing_fields(saved: Compatibility, current: Compatibility) -> list[str]:
    """One line for each field that a checkpoint and the configuration do not share."""
    names = sorted({*saved, *current})
    width = max(map(len, names), default=0)
    return [
        f"{name:<{width}}  {saved.get(name)!r} in the checkpoint, {current.get(name)!r} in the configuration"
        for name in names
        if saved.get(name) != current.get(name)
    ]
