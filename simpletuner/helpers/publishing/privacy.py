"""What leaves this machine holds names in place of paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from simpletuner.helpers.configuration.text.secrets import HIDDEN

_FOLDERS = frozenset({"instance_data_dir", "folder", "aws_endpoint_url"})
"""Keys of places of images, which may be the URLs of private storage."""
_PATH = re.compile(r"(?:/|~[^\s/\\]*[/\\]|\\\\|[A-Za-z]:[\\/]|\.{1,2}[\\/])\S")


def without_paths(value: Any) -> Any:
    """JSON in which each text that is a path is the last name of the path; JSON in a text is looked through.

    A path begins with a slash, a drive, a dot and a slash, or ~. The URL of a place of images is hidden.
    """
    if isinstance(value, Mapping):
        return {
            without_paths(key): HIDDEN if key in _FOLDERS and "://" in str(each) else without_paths(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith(("{", "[")):
        return _within_json(value)
    return re.split(r"[\\/]+", text.rstrip("\\/"))[-1] if _PATH.match(text) else value


def _within_json(text: str) -> str:
    """A text with JSON in it, unchanged if it has no path."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    private = without_paths(content)
    return text if private == content else json.dumps(private, ensure_ascii=False, sort_keys=True)
