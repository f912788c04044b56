"""Cache entries in files of their own, as earlier versions wrote them: still read, or refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from simpletuner.helpers.caching.shards import digest_of
from simpletuner.helpers.caching.single_files import SingleFiles
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.errors import DataError
from tests.unit.caching.stored import held

KEY, OTHER_KEY = content_key("one"), content_key("other")
TENSORS = {"latents": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)}


@pytest.fixture
def files(tmp_path: Path) -> SingleFiles:
    return SingleFiles(tmp_path / "cache")


def write_example(files: SingleFiles) -> dict[str, Tensor]:
    path = files.path(KEY)
    path.parent.mkdir(parents=True)
    fields = {"image": "cat.png", "key": KEY, "digest": digest_of(KEY, TENSORS).hex()}
    path.write_bytes(save(TENSORS, fields))
    return TENSORS


def test_a_store_reads_the_files_of_earlier_versions(files: SingleFiles, tmp_path: Path) -> None:
    tensors = write_example(files)
    store = TensorStore(tmp_path / "cache")
    assert held(store, [KEY, OTHER_KEY]) == {KEY}
    entry = store.get(KEY)
    assert entry is not None
    assert torch.equal(entry["latents"], tensors["latents"])


def test_digest_of_a_store_is_that_of_earlier_versions() -> None:
    """Written by the version before shards, for these tensors under this key."""
    assert digest_of(KEY, TENSORS).hex() == "f3cda235facf7aadebd86f4776d17819"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 60, -1])
@pytest.mark.reliability_row(18)
def test_a_truncated_file_is_removed_and_counts_as_missing(files: SingleFiles, length: int) -> None:
    write_example(files)
    data = files.path(KEY).read_bytes()
    files.path(KEY).write_bytes(data[:length])
    assert files.get(KEY) is None
    assert not files.path(KEY).exists()


@pytest.mark.reliability_row(18)
def test_no_flipped_byte_gives_other_tensors(files: SingleFiles) -> None:
    tensors = write_example(files)
    data = files.path(KEY).read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x11
        files.path(KEY).write_bytes(flipped)
        entry = files.get(KEY)
        assert entry is None or torch.equal(entry["latents"], tensors["latents"]), f"byte {place}"
    files.path(KEY).unlink(missing_ok=True)


@pytest.mark.reliability_row(18)
def test_a_file_under_another_key_is_refused(files: SingleFiles) -> None:
    write_example(files)
    files.path(OTHER_KEY).parent.mkdir(parents=True, exist_ok=True)
    files.path(KEY).rename(files.path(OTHER_KEY))
    assert files.get(OTHER_KEY) is None


@pytest.mark.reliability_row(22)
def test_a_pickle_under_an_entry_name_is_not_executed(files: SingleFiles, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    files.path(KEY).parent.mkdir(parents=True)
    files.path(KEY).write_bytes(pickle.dumps(Evil()))
    assert files.get(KEY) is None
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        save({"latents": torch.ones(2)}),
        save({"latents": torch.ones(2)}, {"key": KEY}),
        save({"latents": torch.ones(2)}, {"key": KEY, "digest": "0" * 32}),
        (2).to_bytes(8, "little") + b"[]",
    ],
    ids=["huge header", "no metadata", "no digest", "wrong digest", "list"],
)
@pytest.mark.reliability_row(23)
def test_a_hostile_file_is_refused(files: SingleFiles, data: bytes) -> None:
    files.path(KEY).parent.mkdir(parents=True)
    files.path(KEY).write_bytes(data)
    assert files.get(KEY) is None


def test_an_entry_that_is_a_folder_is_an_error_that_names_it(files: SingleFiles) -> None:
    files.path(KEY).mkdir(parents=True)
    with pytest.raises(DataError, match=KEY):
        files.get(KEY)
