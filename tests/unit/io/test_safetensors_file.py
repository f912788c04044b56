"""The header of a safetensors file, read and replaced without its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.helpers.errors import PublishError
from simpletuner.helpers.io.safetensors_file import read_metadata, with_metadata


def test_other_texts_in_a_header_leave_the_tensors_as_they_are(tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"x": torch.randn(3, 5), "y": torch.arange(7)}
    save_file(tensors, file, metadata={"base": "old"})
    assert read_metadata(file, error=PublishError) == {"base": "old"}
    data = with_metadata(file, {"base": "a much longer text"}, error=PublishError)
    assert int.from_bytes(data[:8], "little") % 8 == 0, "tensors are read where they are aligned"
    other.write_bytes(data)
    assert read_metadata(other, error=PublishError) == {"base": "a much longer text"}
    with safe_open(other, framework="pt") as opened:
        assert opened.metadata() == {"base": "a much longer text"}
    assert {key: value.tolist() for key, value in load_file(other).items()} == {
        key: value.tolist() for key, value in tensors.items()
    }


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b"\x04\0\0\0\0\0\0\0null"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    for read in (read_metadata, lambda path, error: with_metadata(path, {}, error=error)):
        with pytest.raises(PublishError):
            read(file, error=PublishError)
    with pytest.raises(PublishError):
        read_metadata(tmp_path / "missing", error=PublishError)
