"""Errors that a user can act on, each with the exit code of the run it ends."""


class SimpleTunerError(Exception):
    """A failure that the message explains: where, what was found, what is allowed, what to do."""

    exit_code = 1


class ConfigError(SimpleTunerError):
    """The configuration cannot be used; the message lists every problem that could be read."""

    exit_code = 2


class DataError(SimpleTunerError):
    """An image, a caption or a cache entry cannot be used."""


class ModelError(SimpleTunerError):
    """A model folder, repository or component cannot be loaded."""


class AdapterError(SimpleTunerError):
    """An adapter does not fit the model, or its file cannot be used."""


class CheckpointError(SimpleTunerError):
    """A checkpoint cannot be written, or cannot be resumed from."""


class NothingToResumeError(CheckpointError):
    """A named checkpoint to resume from does not exist."""

    exit_code = 3


class MissingDependencyError(SimpleTunerError):
    """An optional package is not installed; the message names the extra that brings it."""


class TrainingError(SimpleTunerError):
    """Training cannot go on, for instance because the loss is not finite."""
