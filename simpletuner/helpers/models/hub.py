"""Files of a hub repository on this machine: from the cache without any request, else downloaded."""

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

logger = logging.getLogger(__name__)

# The root of the HTTP client's own errors; which client that is changes between versions of the hub library.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
assert issubclass(TRANSPORT_ERROR, Exception)


def cached(repository: str, *, revision: str | None, patterns: Sequence[str], key: str) -> Path | None:
    """The snapshot folder of a repository in the cache, found without any request; None when there is none.

    Its name is the commit. It may lack files that match the patterns.

    Raises:
        ModelError: The name cannot be that of a repository.
    """
    try:
        return _snapshot(repository, revision=revision, patterns=patterns, local=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(
            f"{key} {repository}: there is no such folder, and it is not a repository name "
            "(owner/name) either. Correct the path, or name a repository."
        ) from error


def downloaded(repository: str, *, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    """The snapshot folder of a repository after downloading the files that match the patterns.

    Its name is the commit. Files that the repository does not have are simply not there.

    Args:
        repository: Its name, owner/name.
        revision: A branch, tag or commit; None is the default branch.
        patterns: Shell patterns of paths in the repository.
        key: The configuration key that named the repository, for messages.

    Raises:
        ModelError: The repository does not exist, is gated, or cannot be reached.
    """
    if not constants.HF_HUB_OFFLINE:
        logger.info("Looking for %s at %s.", ", ".join(patterns[:2]), f"{constants.ENDPOINT}/{repository}")
    try:
        return _snapshot(repository, revision=revision, patterns=patterns, local=False)
    except (TRANSPORT_ERROR, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{key} {repository}: {_explain(error, repository, revision)}") from error


def _explain(error: Exception, repository: str, revision: str | None) -> str:
    """What went wrong and what to do, for one failure of a download."""
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
                f"there is no such folder here, and no such repository on {constants.ENDPOINT} that this "
                "machine may read. Correct the name; for a private repository run: hf auth login"
            )
        case LocalEntryNotFoundError():
            offline = constants.HF_HUB_OFFLINE
            why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached"
            return (
                "there is no such folder here, the repository is not (wholly) in the cache "
                f"({constants.HF_HUB_CACHE}), and {why}. Give a local model folder, or start once with a "
                "connection, which fetches what is used; if the repository asks for it, accept its licence "
                f"at {constants.ENDPOINT}/{repository} before that and run: hf auth login"
            )
    reason = " ".join(str(error).split())[:300]
    return (
        f"the download failed: {type(error).__name__}: {reason}. What has arrived is kept; start again to go "
        "on."
    )


def _snapshot(repository: str, *, revision: str | None, patterns: Sequence[str], local: bool) -> Path:
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), local_files_only=local
        )
    )
