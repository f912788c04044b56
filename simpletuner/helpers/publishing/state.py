"""What was uploaded from an output folder: repository -> path there -> SHA-256."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.helpers.io.atomic import write_json
from simpletuner.helpers.io.run_folder import UPLOAD_FOLDER, UPLOAD_STATE_FILE


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

    def forget(self, repository: str) -> None:
        """Take a repository as empty: it was removed and made anew."""
        self.repositories.pop(repository, None)

    def add(self, repository: str, digests: dict[str, str]) -> None:
        """Note an upload.

        Raises:
            StorageError: The file cannot be written.
        """
        self.repositories[repository] = self.repositories.pop(repository, {}) | digests
        write_json(_file(self.folder), {"repositories": self.repositories})


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
