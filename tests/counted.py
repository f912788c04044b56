"""How much work a call is, in numbers that are the same on a busy machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType
from typing import Any


def builtin_calls(work: Callable[[], object]) -> Counter[str]:
    """How often each built-in function was called."""
    calls: Counter[str] = Counter()

    def note(_frame: FrameType, event: str, called: BuiltinFunctionType) -> None:
        if event == "c_call":
            calls[called.__qualname__] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of Python were run."""
    lines = 0

    def note(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines
