"""Sends a message to an address when a run starts, saves, makes validation images, ends or fails."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from simpletuner import __version__
from simpletuner.helpers.configuration.schema.tracking import LEVELS, Level, WebhookConfig
from simpletuner.helpers.io.names import printable
from simpletuner.helpers.io.redaction import redacted
from simpletuner.helpers.reporting.metrics import StepMetrics

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
JOB_VARIABLE = "SIMPLETUNER_JOB_ID"
# Discord's limits for a channel without boosts, with room for the rest of the request.
LONGEST_CONTENT = 2000
MOST_FILES = 10
MOST_FILE_BYTES = 9 << 20

Kind = Literal["start", "checkpoint", "validation", "end", "stopped", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One event of a run."""

    kind: Kind
    text: str
    step: int
    level: Level = "info"
    images: Mapping[str, Path] = field(default_factory=dict)
    """Label -> file."""


class _NoRedirects(HTTPRedirectHandler):
    """An address that moves is not followed: another host would get the message."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None makes the answer an error."""


class Webhook:
    """Posts messages to one address. A message that cannot be sent is lost, with one warning for the run."""

    def __init__(self, config: WebhookConfig, *, name: str) -> None:
        self._config = config
        self._prefix = redacted(config.message_prefix or name)
        self._has_warned = False

    def start(self) -> None:
        """Nothing: the first message opens a connection."""

    def log(self, record: StepMetrics) -> None:
        """Nothing: a step is no message."""

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Send the validation images of a step."""
        self.send(Message(kind="validation", text=f"Validation of step {step}", step=step, images=images))

    def log_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Nothing: the images are a message."""

    def finish(self) -> None:
        """Nothing: no connection stays open."""

    def send(self, message: Message) -> None:
        """Post a message, if it is urgent enough."""
        if LEVELS.index(message.level) > LEVELS.index(self._config.log_level):
            return
        message = replace(message, text=redacted(message.text))
        encode = _discord if self._config.webhook_type == "discord" else _raw
        try:
            body, content_type = encode(message, self._prefix)
            headers = {"Content-Type": content_type, "User-Agent": f"simpletuner/{__version__}"}
            request = Request(self._config.webhook_url, data=body, headers=headers, method="POST")
            with build_opener(_NoRedirects).open(request, timeout=TIMEOUT_S):
                pass
        except (OSError, HTTPException, ValueError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Say once that messages are lost; the text of an error may hold the address, so it is left out."""
        if self._has_warned:
            return
        self._has_warned = True
        reason = f"HTTP status {error.code}" if isinstance(error, HTTPError) else type(error).__name__
        logger.warning("A message to the %s webhook was lost: %s.", self._config.webhook_type, reason)


def _raw(message: Message, prefix: str) -> tuple[bytes, str]:
    """A json object and its type."""
    content = {
        "message_type": message.kind,
        "severity": message.level,
        "message": message.text,
        "prefix": prefix,
        "step": message.step,
        "images": {label: redacted(str(path)) for label, path in message.images.items()},
        "job_id": os.environ.get(JOB_VARIABLE),
        "timestamp": datetime.now(UTC).isoformat(),
    }
    return json.dumps(content).encode(), "application/json"


def _discord(message: Message, prefix: str) -> tuple[bytes, str]:
    """A message with its images attached: a form of several parts, and its type."""
    files, left = _attached(message.images)
    text = f"`({prefix})` {message.text}{f' ({left} images are too large)' if left else ''}"
    content = json.dumps({"content": text[:LONGEST_CONTENT], "allowed_mentions": {"parse": []}})
    if not files:
        return content.encode(), "application/json"
    boundary = secrets.token_hex(16)
    parts = [
        _part(
            boundary,
            content.encode(),
            disposition='name="payload_json"',
            content_type="application/json",
        )
    ]
    for index, (name, data) in enumerate(files.items()):
        disposition = f'name="files[{index}]"; filename="{name}"'
        parts.append(_part(boundary, data, disposition=disposition, content_type="image/png"))
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def _attached(images: Mapping[str, Path]) -> tuple[dict[str, bytes], int]:
    """Name -> bytes of the images that fit into one message, and the number of the others."""
    files: dict[str, bytes] = {}
    total = 0
    for path in images.values():
        size = path.stat().st_size
        if len(files) < MOST_FILES and total + size <= MOST_FILE_BYTES:
            files[printable(path.name).replace('"', "'")] = path.read_bytes()
            total += size
    return files, len(images) - len(files)


def _part(boundary: str, data: bytes, *, disposition: str, content_type: str) -> bytes:
    head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\nContent-Type: {content_type}"
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"
