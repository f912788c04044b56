"""Values without access tokens, for files that others read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simpletuner.helpers.io.redaction import redacted

HIDDEN = "(hidden)"
_SECRET_KEY = re.compile(
    r"(^|[_-])(token|secret|password|passwd|api_?key|credential|access_key(_id)?)s?$", re.IGNORECASE
)
_WORDS = frozenset({"placeholder_token", "initializer_token"})
"""Keys whose tokens are words of prompts."""
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|AKIA|xox[abp]-)[A-Za-z0-9_-]{12,}")


def without_secrets(value: Any) -> Any:
    """JSON with HIDDEN in place of access tokens and of values whose key names a secret."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if each and _names_secret(str(key)) else without_secrets(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return _SECRET_VALUE.sub(HIDDEN, redacted(value)) if isinstance(value, str) else value


def _names_secret(key: str) -> bool:
    return key not in _WORDS and _SECRET_KEY.search(key) is not None
