"""Errors that a user can act on, each with the exit code of the run that it ends."""

from __future__ import annotations


class SimpleTunerError(Exception):
    """A failure with a message that says where, what was found, what is allowed, what to do."""

    exit_code = 1


class ConfigError(SimpleTunerError):
    """The configuration is invalid; the message lists all problems."""

    exit_code = 2


class DataError(SimpleTunerError):
    """An image, a caption or a cache entry is unusable."""


class DamagedImageError(DataError):
    """The pixels of an image cannot be decoded, or only in part; the message does not name the file."""


class CacheEntryError(DataError):
    """A cache entry is missing or damaged; the next start makes it anew."""


class LoaderTimeoutError(DataError):
    """The loader has been reading for longer than loader_timeout_seconds."""


class SourceError(SimpleTunerError):
    """A place of images cannot be listed or read; the message names it."""


class UnreachableError(SourceError):
    """The place may be right, but it does not answer for now: no network, a server that is down or slow."""


class ModelError(SimpleTunerError):
    """A model folder, repository or component cannot be found or loaded."""


class AdapterError(SimpleTunerError):
    """An adapter does not fit the model, or its file is unusable."""


class CheckpointError(SimpleTunerError):
    """A checkpoint cannot be written or resumed."""


class NothingToResumeError(CheckpointError):
    """The checkpoint that resume_from_checkpoint names does not exist."""

    exit_code = 3


class PublishError(SimpleTunerError):
    """Files cannot be uploaded."""


class MissingDependencyError(SimpleTunerError):
    """An optional package is not installed; the message names the extra to install."""


class TrainingError(SimpleTunerError):
    """Training cannot continue, for instance because the loss is not finite."""
