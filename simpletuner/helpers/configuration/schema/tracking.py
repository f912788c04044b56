"""Trackers, and webhooks: addresses that get messages of a run."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field

from simpletuner.helpers.choices.trackers import TRACKERS
from simpletuner.helpers.configuration.schema.base import (
    NonNegativeNumber,
    OneOf,
    OptionalInputFile,
    OptionalText,
    Section,
)
from simpletuner.helpers.configuration.schema.values import trackers

Level = Literal["critical", "error", "warning", "info", "debug"]
LEVELS: tuple[Level, ...] = ("critical", "error", "warning", "info", "debug")
"""Most urgent first."""


def _address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address that begins with https:// or http://.")
    return value


class WebhookConfig(Section):
    """An address that gets a message when a run starts, saves, makes validation images, ends or fails."""

    webhook_type: Literal["discord", "raw"]
    """discord, a channel of Discord; raw, a POST request with a json object."""
    webhook_url: Annotated[str, Field(repr=False), AfterValidator(_address)]
    """The address; raw may call it callback_url. It is in no log and no file of the run."""
    log_level: Level = "info"
    """Least urgent messages that are sent: a failure is an error, everything else info."""
    message_prefix: OptionalText = None
    """Text before each message. Default: tracker_run_name, else tracker_project_name."""


class TrackingConfig(Section):
    """Trackers, besides the log in output_dir."""

    report_to: Annotated[tuple[Annotated[str, OneOf(TRACKERS)], ...], BeforeValidator(trackers)] = ()
    """Trackers, a list or comma-separated; none for no tracker."""
    tracker_project_name: str = "simpletuner"
    """Project of the run in the tracker."""
    tracker_run_name: OptionalText = None
    """Name of the run in the tracker; null lets the tracker choose."""
    tracker_timeout_seconds: NonNegativeNumber = 30.0
    """Seconds that a finished run waits for its trackers, all together; 0 does not wait."""
    webhook_config: OptionalInputFile = None
    """A json with one webhook or a list of them; or the object or list itself, which is then in no file of
    the run."""
    webhooks: tuple[WebhookConfig, ...] = ()
    """All webhooks."""
