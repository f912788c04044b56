"""The Hugging Face hub: login, repository and commit, with errors that say what to do."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from simpletuner.helpers.errors import ConfigError, PublishError
from simpletuner.helpers.io.names import one_line_reason

logger = logging.getLogger(__name__)

# Base class of the HTTP client's errors; the client differs between versions of huggingface_hub.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
assert issubclass(TRANSPORT_ERROR, Exception)
# A server that accepts a connection and never answers; the client itself waits for ever.
ANSWER_WAIT_S = 120.0
PAUSES_S = (5.0, 30.0)
"""Before the second and the third attempt; the client repeats some requests by itself besides."""
LONGEST_PAUSE_S = 120.0
"""Of those that a server asks for."""
REFUSED, BUSY = (401, 403), (408, 409, 412, 429)
LOGIN = "Run: hf auth login, with a token that may write, or set the environment variable HF_TOKEN"

# Of an address in an error: it may hold a signature.
_QUERY = re.compile(r"\?[^\s'\"]*")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository that this login may write to."""

    name: str
    """owner/name."""
    is_new: bool
    """Whether it was created just now."""
    is_private: bool

    @property
    def address(self) -> str:
        """Its page."""
        return f"{constants.ENDPOINT}/{self.name}"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    return bool(constants.HF_HUB_OFFLINE)


def bound_waits() -> None:
    """Have this process wait for an answer of the hub for ANSWER_WAIT_S at most."""
    client = type(get_session())
    set_client_factory(lambda: client(follow_redirects=True, timeout=ANSWER_WAIT_S))


def open_repository(name: str, *, private: bool) -> Repository:
    """Find or create a repository.

    Args:
        name: owner/name, or name for the owner of the login.
        private: Create it private, and refuse one that is public.

    Raises:
        ConfigError: There is no valid login, it may not write there, or the repository is public.
        PublishError: The hub cannot be reached, or fails.
    """
    api = HfApi()
    try:
        owner = str(api.whoami()["name"])
        full_name = name if "/" in name else f"{owner}/{name}"
        is_new = _create(api, full_name, private=private)
        is_private = private if is_new else bool(api.model_info(full_name).private)
    except (LocalTokenNotFoundError, TRANSPORT_ERROR, OSError, ValueError, LookupError) as error:
        raise _explained(error, name) from error
    if private and not is_private:
        raise ConfigError(
            f"The repository {full_name} is public, and model_card_private is true. Set model_card_private "
            "to false, or make the repository private in its settings, or set another hub_model_id."
        )
    return Repository(full_name, is_new, is_private)


def commit(repository: Repository, files: Mapping[str, Path], *, message: str) -> None:
    """Upload files in one commit; what the hub has of them already is not sent again.

    Args:
        repository: Where.
        files: Path in the repository -> file.
        message: Title of the commit.

    Raises:
        ConfigError: The login is not valid any more, or may not write there.
        PublishError: The hub cannot be reached, or fails.
    """
    operations = [CommitOperationAdd(name, str(file)) for name, file in sorted(files.items())]
    try:
        HfApi().create_commit(repository.name, operations, commit_message=message)
    # hf_xet's errors are RuntimeError, as are those of the client's upload threads.
    except (LocalTokenNotFoundError, TRANSPORT_ERROR, OSError, ValueError, RuntimeError) as error:
        raise _explained(error, repository.name) from error


def with_retries(action: Callable[[], T], *, sleep: Callable[[float], object] = time.sleep) -> T:
    """The result of an action that is repeated when the hub fails, is busy or cannot be reached.

    Raises:
        ConfigError: Not repeated: the login or the repository is refused.
        PublishError: The last attempt failed, or another one would fail alike.
    """
    for pause_s in PAUSES_S:
        try:
            return action()
        except PublishError as error:
            wanted_s = _pause_s(error, pause_s)
            if wanted_s is None:
                raise
            logger.warning("%s Trying again in %g s.", error, wanted_s)
            sleep(wanted_s)
    return action()


def _create(api: HfApi, name: str, *, private: bool) -> bool:
    """Create a repository; whether there was none."""
    try:
        api.create_repo(name, private=private)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 409:
            return False
        # A token for one repository may write to it, and not create it.
        if status in REFUSED and api.repo_exists(name):
            return False
        raise
    return True


def _pause_s(error: PublishError, pause_s: float) -> float | None:
    """Seconds until the next attempt; None if it would fail alike."""
    response = _response(error.__cause__)
    if response is None:
        return None if isinstance(error.__cause__, ValueError) else pause_s
    if response.status_code not in BUSY and response.status_code < 500:
        return None
    wanted = response.headers.get("Retry-After", "")
    return min(float(wanted), LONGEST_PAUSE_S) if wanted.isdecimal() else pause_s


def _response(error: BaseException | None) -> Any:
    """The hub's answer behind an error; None without one."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response


def _explained(error: Exception, name: str) -> ConfigError | PublishError:
    if isinstance(error, LocalTokenNotFoundError):
        return ConfigError(f"push_to_hub: there is no login at {constants.ENDPOINT}. {LOGIN}.")
    response = _response(error)
    if response is not None and response.status_code == 401:
        return ConfigError(f"push_to_hub: {constants.ENDPOINT} refuses the token of this login. {LOGIN}.")
    if response is not None and response.status_code == 403:
        return ConfigError(
            f"push_to_hub: this login may not write to {name} at {constants.ENDPOINT}. {LOGIN}, or set "
            "another hub_model_id."
        )
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    cause = cause if isinstance(cause, Exception) else error
    reason = _QUERY.sub("", one_line_reason(cause)).rstrip(".")
    return PublishError(f"The upload to {name} failed: {type(cause).__name__}: {reason}.")
