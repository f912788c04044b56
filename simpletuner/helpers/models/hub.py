"""Files of a hub repository: from the local cache without a request, else downloaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.io.names import one_line_reason

logger = logging.getLogger(__name__)

# Base class of the HTTP client's errors; the client differs between versions of huggingface_hub.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
assert issubclass(TRANSPORT_ERROR, Exception)


def cached(repository: str, *, revision: str | None, patterns: Sequence[str], key: str) -> Path | None:
    """Snapshot folder of a repository in the cache, found without a request; None if there is none.

    The folder's name is the commit. Files that match the patterns may be missing.

    Raises:
        ModelError: The name is no valid repository name.
    """
    try:
        return _snapshot(repository, revision=revision, patterns=patterns, local=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            f"{key} {repository}: neither an existing folder nor a repository name (owner/name). "
            "Correct the path, or name a repository."
        ) from error


def downloaded(repository: str, *, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    """Snapshot folder of a repository after downloading the files that match the patterns.

    The folder's name is the commit. Files that the repository lacks are missing.

    Args:
        repository: owner/name.
        revision: Branch, tag or commit; None is the default branch.
        patterns: Shell patterns of paths in the repository.
        key: Configuration key of the repository, for messages.

    Raises:
        ModelError: The repository does not exist, is gated, or is unreachable.
    """
    if not constants.HF_HUB_OFFLINE:
        logger.info("Looking for %s at %s.", ", ".join(patterns[:2]), f"{constants.ENDPOINT}/{repository}")
    try:
        return _snapshot(repository, revision=revision, patterns=patterns, local=False)
    except (TRANSPORT_ERROR, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{key} {repository}: {_explain(error, repository, revision)}") from error


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    """Reason and remedy of a failed download."""
    match error:
        case GatedRepoError():
            return (
                f"the repository is gated. Accept its licence at {constants.ENDPOINT}/{repository}, "
                "then run: hf auth login"
            )
        case RevisionNotFoundError():
            return f"the repository has no revision {revision}. Correct or drop revision."
        case RepositoryNotFoundError():
            return (
                f"no such local folder, and no such repository on {constants.ENDPOINT} that this machine may "
                "read. Correct the name; for a private repository run: hf auth login"
            )
        case LocalEntryNotFoundError():
            offline = constants.HF_HUB_OFFLINE
            why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
            return (
                "no such local folder, the repository is not (completely) in the cache "
                f"({constants.HF_HUB_CACHE}), and {why}. Give a local model folder, or start once with a "
                "connection to download the model. For a gated repository first accept the licence at "
                f"{constants.ENDPOINT}/{repository} and run: hf auth login"
            )
    return (
        f"the download failed: {type(error).__name__}: {one_line_reason(error)}. Start again to resume the "
        "download."
    )


def _snapshot(repository: str, *, revision: str | None, patterns: Sequence[str], local: bool) -> Path:
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), local_files_only=local
        )
    )
