"""Small files that other programs write beside an adapter file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simpletuner.helpers.errors import AdapterError

MAX_BYTES = 1 << 20


def text_beside(adapter: Path, name: str) -> str | None:
    """Text of a file in the adapter's folder; None without it.

    Raises:
        AdapterError: It is larger than 1 MiB, or cannot be read as text.
    """
    path = adapter.parent / name
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise AdapterError(
                f"{path}: larger than {MAX_BYTES} bytes. Remove it if it is not the adapter's."
            )
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(
            f"{path}: cannot be read: {error}. Remove it if it is not the adapter's."
        ) from error


def json_beside(adapter: Path, name: str) -> dict[str, Any] | None:
    """A JSON object in the adapter's folder; None without it.

    Raises:
        AdapterError: It is no JSON object, or too large.
    """
    text = text_beside(adapter, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{adapter.parent / name}: not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{adapter.parent / name}: a {type(value).__name__}, not an object.")
    return value
