"""Checkpoints of a run: save, find, verify, prune, and refuse those of another run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from simpletuner.helpers.checkpointing.branch import Branch, load_branch, save_branch
from simpletuner.helpers.checkpointing.intervals import Epochs
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
AGAIN = "!"
"""After the name of a checkpoint: go back to it though the run has saved others since."""

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
    epochs: Epochs = field(default_factory=Epochs)
    """Where epochs end, for checkpoint_epoch_interval."""
    branch: Branch | None = None
    """None unless the run went back to an earlier checkpoint."""

    def is_due(self, step: int) -> bool:
        """Whether an interval asks for a checkpoint after this optimiser step."""
        config = self.config
        return self.epochs.is_due(
            step, steps=config.checkpoint_step_interval, epochs=config.checkpoint_epoch_interval
        )

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
            with publish_folder(path, needed=self.state.num_bytes) as folder:
                self.state.save(folder)
                write_json(folder / COMPATIBILITY_FILE, self.compatibility)
                write_json(folder / CONFIG_FILE, self.resolved)
            logger.info("Saved %s", path)
            if self.branch is not None:
                self.branch = self.branch.with_saved(step)
                save_branch(self.config.output_dir, self.branch)
            self._prune()
        elif self.state.is_sharded:
            with TemporaryDirectory() as scratch:
                self.state.save(Path(scratch))

    def _prune(self) -> None:
        limit = self.config.checkpoints_total_limit
        if limit is None:
            return
        own = () if self.branch is None else self.branch.saved
        existing = list_checkpoints(self.config.output_dir)
        # The run's own first: those that it left when it went back may have higher steps.
        for checkpoint in sorted(existing, key=lambda each: each.step not in own)[limit:]:
            if checkpoint.step != self.saved_step:
                # Renamed first: an interrupted removal must not leave half a checkpoint under its name.
                removed = checkpoint.path.with_name(f"{REMOVED_PREFIX}{checkpoint.path.name}")
                try:
                    checkpoint.path.rename(removed)
                    crash_point("checkpoint.pruning")
                    shutil.rmtree(removed)
                except PermissionError as error:  # on Windows also while a program has a file of it open
                    logger.warning("%s cannot be removed now: %s.", checkpoint.path, error.strerror)
                else:
                    logger.info("Removed %s: checkpoints_total_limit is %d.", checkpoint.path, limit)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a killed run left half written or half removed. The caller holds the run lock."""
    remove_leftovers(output_dir, of_other_hosts=True)
    for folder in output_dir.glob(f"{REMOVED_PREFIX}*"):
        shutil.rmtree(folder)


def list_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """The checkpoints in a folder, newest step first, unverified."""
    return [Checkpoint(path, step) for step, path in reversed(checkpoint_folders(output_dir))]


def current_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Those that led to the present state of the run, newest first, without those that it left."""
    existing, branch = list_checkpoints(output_dir), load_branch(output_dir)
    if branch is None or not any(checkpoint.step in branch.saved for checkpoint in existing):
        return existing
    return [each for each in existing if each.step <= branch.start or each.step in branch.saved]


def find_checkpoint(config: CheckpointConfig, *, settings: Fields) -> Checkpoint | None:
    """The intact checkpoint that `resume_from_checkpoint` selects; None to start at step 0.

    A name selects that checkpoint until the run has saved one of its own after it, then the newest of those;
    a name followed by ! always selects that checkpoint.

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
        current = current_checkpoints(config.output_dir)
        found = _newest_intact(current)
        if found is None and current:
            raise CheckpointError(
                f"All {len(current)} checkpoints in {config.output_dir} are damaged. Move them away to start "
                "at step 0."
            )
    else:
        found = _newest_of_branch(wanted, existing, config.output_dir) or _named(wanted, existing, config)
    if found is not None:
        check_compatible(found, "settings", settings)
        _log_left(found, existing, config)
    return found


def branch_from(found: Checkpoint | None, config: CheckpointConfig) -> Branch | None:
    """The branch of a run that goes on from the checkpoint that `find_checkpoint` returned."""
    branch, wanted = load_branch(config.output_dir), config.resume_from_checkpoint
    if found is None or wanted is None:
        return None
    if wanted == LATEST:
        return branch if branch is not None and branch.holds(found.step) else None
    if branch is not None and found.step in branch.saved and _starts_from(branch, wanted, config.output_dir):
        return branch
    return Branch(found.step)


def _newest_intact(existing: list[Checkpoint]) -> Checkpoint | None:
    for checkpoint in existing:
        problems = verify_manifest(checkpoint.path)
        if not problems:
            return checkpoint
        logger.warning("Skipping damaged %s: %s.", checkpoint.path, "; ".join(problems))
    return None


def _newest_of_branch(name: str, existing: list[Checkpoint], output_dir: Path) -> Checkpoint | None:
    """The newest intact checkpoint that the run saved since it went back to the named one."""
    branch = load_branch(output_dir)
    if branch is None or not _starts_from(branch, name, output_dir):
        return None
    return _newest_intact([checkpoint for checkpoint in existing if checkpoint.step in branch.saved])


def _starts_from(branch: Branch, name: str, output_dir: Path) -> bool:
    return checkpoint_folder(output_dir, branch.start).name == name


def _named(wanted: str, existing: list[Checkpoint], config: CheckpointConfig) -> Checkpoint:
    name = wanted.removesuffix(AGAIN)
    for checkpoint in existing:
        if checkpoint.path.name != name:
            continue
        problems = verify_manifest(checkpoint.path)
        if problems:
            raise CheckpointError(
                f"{checkpoint.path} is damaged: {'; '.join(problems)}. Name another checkpoint, or latest."
            )
        if wanted != name:
            logger.warning(
                "resume_from_checkpoint %s goes back to that checkpoint at every start. Remove the %s, and "
                "the next start goes on from the newest checkpoint that this run has saved.",
                wanted,
                AGAIN,
            )
        return checkpoint
    names = ", ".join(checkpoint.path.name for checkpoint in existing) or "none"
    raise NothingToResumeError(
        f"resume_from_checkpoint {wanted} is not in {config.output_dir} (checkpoints: {names}). "
        "Name one of those, or latest to take the newest one or start at step 0."
    )


def _log_left(found: Checkpoint, existing: list[Checkpoint], config: CheckpointConfig) -> None:
    """Name the newer checkpoints that the run does not go on from."""
    branch = branch_from(found, config)
    left = [each for each in existing if each.step > found.step]
    if branch is not None and left:
        logger.warning(
            "Going on from %s leaves %s. They stay until this run overwrites them or "
            "checkpoints_total_limit removes them; resume_from_checkpoint %s goes back.",
            found.path.name,
            ", ".join(each.path.name for each in left),
            left[0].path.name,
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
