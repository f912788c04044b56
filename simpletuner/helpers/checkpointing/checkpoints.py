"""Checkpoints of a run: save, find, verify, prune, and refuse those of another run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
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
    from simpletuner.helpers.checkpointing.state import RunState
    from simpletuner.helpers.configuration.schema.sections import CheckpointConfig

logger = logging.getLogger(__name__)

LATEST = "latest"

Fields = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One folder with the state of a run after `step` optimiser steps."""

    path: Path
    step: int


@dataclass(kw_only=True, slots=True)
class Checkpoints:
    """Saves the state of a run, and removes the checkpoints beyond checkpoints_total_limit."""

    config: CheckpointConfig
    state: RunState
    compatibility: Mapping[str, Fields]
    """Part -> fields that a resumed run must share, for `check_compatible`."""
    resolved: Fields
    """The whole configuration, for the reader."""
    is_main_process: bool
    saved_step: int | None = None
    """Step of the newest checkpoint that this run saved or resumed from."""

    def is_due(self, step: int) -> bool:
        """Whether checkpoint_step_interval asks for a checkpoint after this optimiser step."""
        interval = self.config.checkpoint_step_interval
        return interval > 0 and step % interval == 0

    def save(self) -> None:
        """Save the current step, once. Every process calls it.

        The main process publishes the folder. The others help to gather a sharded state and discard it.

        Raises:
            CheckpointError: A file cannot be written. Earlier checkpoints are kept.
            StorageError: The same, for lack of space or permission.
        """
        step = self.state.progress.step
        if self.saved_step == step:
            return
        self.saved_step = step
        if self.is_main_process:
            path = checkpoint_folder(self.config.output_dir, step)
            with publish_folder(path) as folder:
                self.state.save(folder)
                write_json(folder / COMPATIBILITY_FILE, self.compatibility)
                write_json(folder / CONFIG_FILE, self.resolved)
            logger.info("Saved %s", path)
            self._prune()
        elif self.state.is_sharded:
            with TemporaryDirectory() as scratch:
                self.state.save(Path(scratch))

    def _prune(self) -> None:
        limit = self.config.checkpoints_total_limit
        if limit is None:
            return
        for checkpoint in list_checkpoints(self.config.output_dir)[limit:]:
            if checkpoint.step != self.saved_step:
                # Renamed first: an interrupted removal must not leave half a checkpoint under its name.
                removed = checkpoint.path.with_name(f"{REMOVED_PREFIX}{checkpoint.path.name}")
                checkpoint.path.rename(removed)
                crash_point("checkpoint.pruning")
                shutil.rmtree(removed)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a killed run left half written or half removed. The caller holds the run lock."""
    remove_leftovers(output_dir, of_other_hosts=True)
    for folder in output_dir.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(folder)


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, newest step first, unverified."""
    return [Checkpoint(path, step) for step, path in reversed(checkpoint_folders(output_dir))]


def find_checkpoint(config: CheckpointConfig, *, settings: Fields) -> Checkpoint | None:
    """The intact checkpoint that `resume_from_checkpoint` selects; None to start at step 0.

    Raises:
        NothingToResumeError: The named checkpoint does not exist.
        CheckpointError: The named checkpoint is damaged, or all are; the run has other settings; or
            resume_from_checkpoint is none and the folder holds checkpoints.
    """
    wanted, existing = config.resume_from_checkpoint, list_checkpoints(config.output_dir)
    if wanted is None:
        if existing:
            raise CheckpointError(
                f"{config.output_dir} holds {existing[0].path.name} of an earlier run, and "
                "resume_from_checkpoint is none. Choose another output_dir, or resume from latest."
            )
        return None
    if wanted == LATEST:
        found = _newest_intact(existing, config.output_dir)
    else:
        found = _named(wanted, existing, config.output_dir)
    if found is not None:
        check_compatible(found, "settings", settings)
    return found


def _newest_intact(existing: list[Checkpoint], output_dir: Path) -> Checkpoint | None:
    for checkpoint in existing:
        problems = verify_manifest(checkpoint.path)
        if not problems:
            return checkpoint
        logger.warning("Skipping damaged %s: %s.", checkpoint.path, "; ".join(problems))
    if existing:
        raise CheckpointError(
            f"All {len(existing)} checkpoints in {output_dir} are damaged. Move them away to start at step 0."
        )
    return None


def _named(name: str, existing: list[Checkpoint], output_dir: Path) -> Checkpoint:
    for checkpoint in existing:
        if checkpoint.path.name != Path(name).name:
            continue
        problems = verify_manifest(checkpoint.path)
        if problems:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: {'; '.join(problems)}. Name another checkpoint, or latest."
            )
        if checkpoint is not existing[0]:
            logger.warning(
                "%s is newer than %s and stays until this run overwrites it; resume_from_checkpoint latest "
                "selects it.",
                existing[0].path.name,
                name,
            )
        return checkpoint
    names = ", ".join(checkpoint.path.name for checkpoint in existing) or "none"
    raise NothingToResumeError(
        f"resume_from_checkpoint {name} is not in {output_dir} (checkpoints: {names}). "
        "Name one of those, or latest to take the newest one or start at step 0."
    )


def check_compatible(checkpoint: Checkpoint, part: str, current: Fields) -> None:
    """Compare one part of a checkpoint's compatibility file with this run.

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
            f"{checkpoint.path} was made with other settings and cannot be resumed:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nRestore these settings, or choose another output_dir to start at step 0."
        )


def differing_fields(saved: Fields, current: Fields) -> list[str]:
    """One line for each field that differs between a checkpoint and the configuration."""
    names = sorted({*saved, *current})
    width = max(map(len, names), default=0)
    return [
        f"{name:<{width}}  {saved.get(name)!r} in the checkpoint, {current.get(name)!r} in the configuration"
        for name in names
        if saved.get(name) != current.get(name)
    ]
