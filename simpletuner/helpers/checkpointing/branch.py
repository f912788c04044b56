"""The branch of a run that went back to an earlier checkpoint: the checkpoints it saved since."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import BRANCH_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Branch:
    """Checkpoints, by their steps, of a run since it went back."""

    start: int
    """Step of the checkpoint that the run went back to."""
    saved: tuple[int, ...] = ()
    """Steps of the checkpoints saved since."""

    def with_saved(self, step: int) -> Branch:
        """The branch after a save at this step."""
        return replace(self, saved=tuple(sorted({*self.saved, step})))

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of this step is the branch's start or its own."""
        return step == self.start or step in self.saved


def load_branch(output_dir: Path) -> Branch | None:
    """The branch of a run; None for a run that never went back, and with a warning for a damaged file."""
    file = output_dir / BRANCH_FILE
    try:
        content = json.loads(file.read_bytes())
        return Branch(start=int(content["start"]), saved=tuple(map(int, content["saved"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s) and is ignored.", file, error)
        return None


def save_branch(output_dir: Path, branch: Branch | None) -> None:
    """Write the branch of a run; None removes the file.

    Raises:
        StorageError: The file cannot be written.
    """
    if branch is None:
        (output_dir / BRANCH_FILE).unlink(missing_ok=True)
    else:
        write_json(output_dir / BRANCH_FILE, asdict(branch))
