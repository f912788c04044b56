"""What a cache holds is counted, checked and pruned; nothing that is used is lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from simpletuner.helpers.caching import maintenance, shard_folder
from simpletuner.helpers.caching import store as limits
from simpletuner.helpers.caching.maintenance import prune, stats, stores_under, unreadable_shards, verify
from simpletuner.helpers.caching.shard_folder import shard_names
from simpletuner.helpers.caching.shards import digest_of, read_about, read_index
from simpletuner.helpers.caching.single_files import SingleFiles
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io import safetensors_file
from tests.unit.caching.stored import held

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
    assert held(TensorStore(folder), KEYS) == {KEYS[0], KEYS[1], KEYS[2], KEYS[4]}


def test_shards_that_are_cut_or_have_no_header_are_unreadable(folder: Path) -> None:
    assert unreadable_shards(folder) == []
    cut, other = put(folder, 5), "shard-0123456789abcdef.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (folder / other).write_bytes(b"cut")
    assert unreadable_shards(folder) == sorted([cut.name, other])
    found = stats(folder)
    assert (found.entries, found.shards, found.unreadable_shards) == (5, 4, 2)


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
    assert held(TensorStore(folder), KEYS) == {KEYS[1], KEYS[4]}
    prune(folder, used=set())
    assert shard_names(folder) == []


def test_prune_removes_a_shard_that_cannot_be_read(folder: Path) -> None:
    (folder / "shard-0123456789abcdef.safetensors").write_bytes(b"cut")
    prune(folder)
    assert "shard-0123456789abcdef.safetensors" not in shard_names(folder)
    assert held(TensorStore(folder), KEYS) >= {KEYS[0], KEYS[1], KEYS[2], KEYS[4]}


def test_a_store_that_is_open_finds_its_entries_after_a_prune(folder: Path) -> None:
    store = TensorStore(folder)
    assert held(store, KEYS[:2]) == set(KEYS[:2])
    prune(folder)
    assert store.get(KEYS[1]) is not None
    assert store.get(KEYS[4]) is not None


def test_stores_are_found_below_a_folder(folder: Path, tmp_path: Path) -> None:
    put(tmp_path / "text", 5)
    assert stores_under(tmp_path) == [tmp_path / "text", folder]
    with pytest.raises(DataError):
        stores_under(tmp_path / "nothing")


@pytest.mark.parametrize("whole_copy", ["shard", "single file"])
def test_prune_keeps_the_whole_copy_of_an_entry_that_is_damaged_in_a_large_shard(
    tmp_path: Path, whole_copy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_SHARD_ENTRIES", 4)
    large = put(tmp_path, 0, 1, 2).rename(tmp_path / f"shard-{'0' * 16}.safetensors")
    if whole_copy == "shard":
        put(tmp_path, 2)
    else:
        put_single(tmp_path, 2)
    spoil(large, 2)
    prune(tmp_path)
    assert verify(tmp_path) == []
    assert held(TensorStore(tmp_path), KEYS) == set(KEYS[:3])


@pytest.mark.parametrize("look", [stats, prune], ids=["stats", "prune"])
def test_a_shard_that_another_process_removes_meanwhile_is_passed_over(
    folder: Path, look: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_removed(folder: Path) -> list[str]:
        return [*shard_names(folder), f"shard-{'0' * 16}.safetensors"]

    monkeypatch.setattr(maintenance, "shard_names", with_removed)
    look(folder)
    assert held(TensorStore(folder), KEYS) >= {KEYS[0], KEYS[1], KEYS[2], KEYS[4]}


def test_prune_has_closed_the_shards_that_it_removes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FileIO] = []

    class Noted(FileIO):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(self)

    remove, were_closed = maintenance._remove, []

    def noted_remove(files: Collection[Path]) -> None:
        were_closed.append(all(each.closed for each in opened))
        remove(files)

    monkeypatch.setattr(shard_folder, "FileIO", Noted)
    monkeypatch.setattr(maintenance, "_remove", noted_remove)
    prune(folder)
    assert opened
    assert all(were_closed)


def test_prune_removes_no_shard_that_cannot_be_read_for_the_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    before = shard_names(folder)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors_file, "_header_bytes", refuse)
        with pytest.raises(DataError):
            prune(folder)
    assert shard_names(folder) == before
    assert held(TensorStore(folder), KEYS) == set(KEYS[:5])
