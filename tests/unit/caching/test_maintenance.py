"""What a cache holds is counted, checked and pruned; nothing that is used is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from simpletuner.helpers.caching.maintenance import prune, stats, stores_under, verify
from simpletuner.helpers.caching.shard_folder import shard_names
from simpletuner.helpers.caching.shards import digest_of, read_about, read_index
from simpletuner.helpers.caching.single_files import SingleFiles
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.errors import DataError

KEYS = [content_key(str(number)) for number in range(6)]


def tensors(key: str) -> dict[str, torch.Tensor]:
    return {"latents": torch.full((16,), float(KEYS.index(key)))}


def put(folder: Path, *numbers: int) -> Path:
    """Write one shard of these entries."""
    before, store = set(shard_names(folder)), TensorStore(folder)
    for number in numbers:
        store.put(KEYS[number], tensors(KEYS[number]), metadata={"image": f"{number}.png"})
    store.flush()
    (name,) = set(shard_names(folder)) - before
    return folder / name


def put_single(folder: Path, number: int) -> None:
    path = SingleFiles(folder).path(KEYS[number])
    path.parent.mkdir(parents=True, exist_ok=True)
    content = tensors(KEYS[number])
    digest = digest_of(KEYS[number], content).hex()
    path.write_bytes(save(content, {"key": KEYS[number], "digest": digest}))


def spoil(shard: Path, number: int) -> None:
    data = bytearray(shard.read_bytes())
    data[read_index(shard)[KEYS[number]].start] ^= 1
    shard.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with entries 0 to 2, 2 and 3 again of which 3 is damaged, and 4 in a file of its own."""
    cache = tmp_path / "vae" / "cats"
    put(cache, 0, 1, 2)
    spoil(put(cache, 2, 3), 3)
    put_single(cache, 4)
    return cache


def test_stats_counts_entries_by_the_headers(folder: Path) -> None:
    found = stats(folder)
    assert (found.entries, found.repeated, found.damaged) == (5, 1, 0)
    assert (found.shards, found.single_files) == (2, 1)
    verify(folder)
    found = stats(folder)
    assert (found.entries, found.repeated, found.damaged) == (4, 1, 1)


def test_verify_names_damaged_entries_which_are_missing_from_then_on(folder: Path) -> None:
    assert verify(folder) == [KEYS[3]]
    assert TensorStore(folder).held(KEYS) == {KEYS[0], KEYS[1], KEYS[2], KEYS[4]}


def test_prune_packs_what_is_whole_into_one_shard_and_keeps_its_texts(folder: Path) -> None:
    verify(folder)
    done = prune(folder)
    assert (done.removed, done.packed) == (2, 4)
    found = stats(folder)
    assert (found.entries, found.shards, found.single_files, found.repeated, found.damaged) == (4, 1, 0, 0, 0)
    store = TensorStore(folder)
    for number in (0, 1, 2, 4):
        assert torch.equal((store.get(KEYS[number]) or {})["latents"], tensors(KEYS[number])["latents"])
    assert "0.png" in read_about(folder / shard_names(folder)[0])[KEYS[0]]
    assert [each.name for each in folder.iterdir() if each.is_file()] == shard_names(folder)
    again = prune(folder)
    assert (again.removed, again.packed, again.freed_bytes) == (0, 0, 0)


def test_prune_removes_entries_that_are_not_used(folder: Path) -> None:
    prune(folder, used={KEYS[1], KEYS[4]})
    assert TensorStore(folder).held(KEYS) == {KEYS[1], KEYS[4]}
    prune(folder, used=set())
    assert shard_names(folder) == []


def test_prune_removes_a_shard_that_cannot_be_read(folder: Path) -> None:
    (folder / "shard-0123456789abcdef.safetensors").write_bytes(b"cut")
    prune(folder)
    assert "shard-0123456789abcdef.safetensors" not in shard_names(folder)
    assert TensorStore(folder).held(KEYS) >= {KEYS[0], KEYS[1], KEYS[2], KEYS[4]}


def test_shards_that_are_cut_or_have_no_header_are_counted(folder: Path) -> None:
    assert stats(folder).unreadable_shards == 0
    cut = put(folder, 5)
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / "shard-0123456789abcdef.safetensors").write_bytes(b"cut")
    found = stats(folder)
    assert (found.entries, found.shards, found.unreadable_shards) == (5, 4, 2)


def test_a_store_that_is_open_finds_its_entries_after_a_prune(folder: Path) -> None:
    store = TensorStore(folder)
    assert store.held(KEYS[:2]) == set(KEYS[:2])
    prune(folder)
    assert store.get(KEYS[1]) is not None
    assert store.get(KEYS[4]) is not None


def test_stores_are_found_below_a_folder(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "text", 5)
    assert stores_under(tmp_path) == [tmp_path / "text", folder]
    with pytest.raises(DataError):
        stores_under(tmp_path / "nothing")
