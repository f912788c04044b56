"""What the repository's files must not say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

# Put together from pieces, so that this file does not find itself.
LOCAL_PATHS = re.compile(
    r"(?<![\w.])/(?:"
    + "|".join(["wo" + "rk", "ho" + "me", "Us" + "ers", "ro" + "ot", "op" + "t/wheels"])
    + r")/\w"
)
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
# How this text came to be is no matter of its readers.
FORBIDDEN_WORDS = re.compile(
    r"\b(?:"
    + "|".join(["chat" + "gpt", "cla" + "ude", "copi" + "lot", "as an a" + "i", "lang" + "uage model"])
    + r")\b",
    re.IGNORECASE,
)
MAX_FILE_BYTES = 4 * 2**20
EMBEDDED_MODEL = "simpletuner/demo/sdxl"
MAX_MODEL_BYTES = 12_000_000
BINARY_SUFFIXES = {".safetensors", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".pdf"}


def _files(repository: Path) -> list[Path]:
    """Tracked files and those that are about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [repository / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def _hits(pattern: re.Pattern[str], *, repository: Path, suffixes: set[str] | None = None) -> list[str]:
    hits = []
    for path in _files(repository):
        if path.suffix in BINARY_SUFFIXES or (suffixes is not None and path.suffix not in suffixes):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                hits.append(f"{path.relative_to(repository)}:{number}: {line.strip()[:80]}")
    return hits


def test_no_path_of_somebodys_machine(repository: Path) -> None:
    assert not _hits(LOCAL_PATHS, repository=repository)


def test_nothing_is_marked_as_unfinished(repository: Path) -> None:
    assert not _hits(UNFINISHED, repository=repository, suffixes={".py", ".sh", ".toml", ".md"})


def test_no_word_about_who_wrote_it(repository: Path) -> None:
    assert not _hits(FORBIDDEN_WORDS, repository=repository)


def test_no_file_is_large(repository: Path) -> None:
    model = repository / EMBEDDED_MODEL
    sizes = {path: path.stat().st_size for path in _files(repository)}
    assert not [
        path.name for path, size in sizes.items() if size > MAX_FILE_BYTES and model not in path.parents
    ]
    assert sum(size for path, size in sizes.items() if model in path.parents) < MAX_MODEL_BYTES


def test_no_package_is_pinned_to_one_machines_build(repository: Path) -> None:
    constraints = (repository / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert len(pins) > 50
    assert not [line for line in pins if "+" in line or "--hash" in line or "@" in line]
