"""What a command writes replaces nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.new_files import refuse_existing, unused


def test_every_file_that_exists_is_named(tmp_path: Path) -> None:
    new, old, link = tmp_path / "new", tmp_path / "old", tmp_path / "link"
    old.touch()
    link.symlink_to("nowhere")
    with pytest.raises(StorageError, match=r"old.*link") as info:
        refuse_existing([new, old, link], overwrite=False)
    assert "new" not in str(info.value).partition(":")[0].replace(str(tmp_path), "")
    refuse_existing([new, old, link], overwrite=True)
    refuse_existing([new], overwrite=False)


def test_unused_name_has_the_first_free_number(tmp_path: Path) -> None:
    file = tmp_path / "00-a_cat.png"
    for name in ("00-a_cat.png", "00-a_cat-2.png", "00-a_cat-3.png"):
        assert unused(file).name == name
        unused(file).touch()
