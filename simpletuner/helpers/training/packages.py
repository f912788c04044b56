"""The check for optional packages, before anything is loaded or cached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simpletuner.helpers.configuration.schema.base import choices_in
from simpletuner.helpers.io.optional import check_installed

if TYPE_CHECKING:
    from simpletuner.helpers.configuration.schema.sections import RunConfig


def check_packages(config: RunConfig) -> None:
    """Check that the optional packages of every choice are installed.

    Raises:
        MissingDependencyError: One is missing; the message names the choice and the extra to install.
    """
    sections = (
        config.precision,
        config.optimizer,
        config.training,
        config.validation,
        *config.datasets,
        config.tracking,
        *([config.lycoris] if config.lycoris is not None else []),
    )
    for section in sections:
        for key, choice in choices_in(section):
            if choice.package:
                check_installed(choice.package, extra=choice.extra, needed_for=f"{key} {choice.name}")
