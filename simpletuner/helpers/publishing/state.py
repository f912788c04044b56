"""What was uploaded from an output folder: repository -> path there -> SHA-256."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import UPLOAD_FOLDER, UPLOAD_STATE_FILE

if TYPE_CHECKING:
    from simpletuner.helpers.publishing.hub import Repository

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Uploaded:
    """The uploads of one output folder, kept in its hub/uploaded.json."""

    folder: Path
    repositories: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def last(self) -> str | None:
        """The repository of the last upload."""
        return next(reversed(self.repositories), None)

    def missing(self, repository: str, digests: dict[str, str]) -> list[str]:
        """The paths whose content the repository does not have."""
        known = self.repositories.get(repository, {})
        return [name for name, digest in digests.items() if known.get(name) != digest]

    def add(self, repository: str, digests: dict[str, str], *, is_new: bool = False) -> None:
        """Note an upload; a new repository has nothing of earlier ones.

        Raises:
            StorageError: The file cannot be written.
        """
        known = self.repositories.pop(repository, {})
        self.repositories[repository] = digests if is_new else known | digests
        write_json(_file(self.folder), {"repositories": self.repositories})


def note_repository(repository: Repository, uploaded: Uploaded) -> None:
    """Note the repository of the uploads to come, and warn of one that holds other files.

    Raises:
        StorageError: The file cannot be written.
    """
    if not repository.is_new and repository.name not in uploaded.repositories:
        logger.warning(
            "The repository %s exists already: files of the same names there get a new version. Set another "
            "hub_model_id to keep them apart.",
            repository.name,
        )
    uploaded.add(repository.name, {}, is_new=repository.is_new)


def load_uploaded(folder: Path) -> Uploaded:
    """The uploads of an output folder; none if the file is missing or damaged: then all is compared again."""
    try:
        found = json.loads(_file(folder).read_bytes())["repositories"]
        repositories = {
            str(name): {str(path): str(digest) for path, digest in files.items()}
            for name, files in found.items()
        }
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        repositories = {}
    return Uploaded(folder, repositories)


def _file(folder: Path) -> Path:
    return folder / UPLOAD_FOLDER / UPLOAD_STATE_FILE
