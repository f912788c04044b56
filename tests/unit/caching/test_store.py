"""Tensors under content keys, packed into shards: what comes back is what was put, or nothing."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from simpletuner.helpers.caching import store as store_module
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.io import atomic
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.redaction import hide
from simpletuner.helpers.io.safetensors_file import header_bytes
from tests.unit.caching.stored import held

KEY, OTHER_KEY = content_key("one"), content_key("other")


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "cache")


def put_example(store: TensorStore) -> dict[str, Tensor]:
    tensors = {"latents": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)}
    store.put(KEY, tensors, metadata={"image": "cat.png"})
    store.flush()
    return tensors


def shards(store: TensorStore) -> list[Path]:
    return sorted(store.folder.glob("shard-*.safetensors"))


def with_header(digest: dict[str, object]) -> bytes:
    """A shard of 16 bytes whose header says this of a digest."""
    return header_bytes({f"{KEY}.digest": digest}) + bytes(16)


def anew(store: TensorStore) -> TensorStore:
    """The store as the next start of a run sees it."""
    return TensorStore(store.folder)


@pytest.mark.parametrize("is_flushed", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 8, 8),
        torch.randn(4, 8).to(torch.bfloat16),
        torch.randn(4, 8).half(),
        torch.tensor([True, False, True]),
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.randn(4, 6).T,
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else tensor,
)
def test_get_gives_what_was_put_for_every_kind_of_tensor(
    store: TensorStore, tensor: Tensor, is_flushed: bool
) -> None:
    for key in (OTHER_KEY, KEY):
        store.put(key, {"a": tensor, "b": torch.ones(2)}, metadata={})
    if is_flushed:
        store.flush()
    entry = (anew(store) if is_flushed else store).get(KEY)
    assert entry is not None
    assert entry["a"].dtype == tensor.dtype
    assert torch.equal(entry["a"], tensor)
    assert torch.equal(entry["b"], torch.ones(2))


def test_get_of_a_missing_key_is_none(store: TensorStore) -> None:
    assert store.get(KEY) is None
    put_example(store)
    assert OTHER_KEY not in store
    assert held(store, [KEY, OTHER_KEY]) == {KEY}


def test_keys_that_begin_alike_are_not_taken_for_each_other(store: TensorStore) -> None:
    put_example(store)
    alike = KEY[:16] + OTHER_KEY[16:]
    assert held(store, [alike]) == set()
    assert store.get(alike) is None


def test_a_shard_is_a_safetensors_file_that_names_its_entries(store: TensorStore) -> None:
    tensors = put_example(store)
    with safe_open(shards(store)[0], framework="pt") as file:
        assert set(file.keys()) == {f"{KEY}.latents", f"{KEY}.digest"}
        assert torch.equal(file.get_tensor(f"{KEY}.latents"), tensors["latents"])
        assert json.loads(json.loads(file.metadata()["about"])[KEY]) == {"image": "cat.png"}


def test_full_shards_are_written_by_number_size_and_time(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [content_key(str(number)) for number in range(9)]
    for name, limit in (
        ("MAX_SHARD_ENTRIES", 3),
        ("MAX_SHARD_BYTES", 3 * 4 * 8),
        ("MAX_WAIT_S", 0.0),
    ):
        before = len(shards(store))
        with monkeypatch.context() as patch:
            patch.setattr(store_module, name, limit)
            for key in keys[:3]:
                store.put(key, {"a": torch.ones(8)}, metadata={})
        assert len(shards(store)) - before == (3 if name == "MAX_WAIT_S" else 1), name
    store.flush()
    assert len(shards(store)) == 5  # nothing was left to write


def test_a_store_sees_what_another_process_wrote_and_packed_away(store: TensorStore) -> None:
    other = anew(store)
    assert store.get(KEY) is None
    tensors = put_example(other)
    assert torch.equal((store.get(KEY) or {})["latents"], tensors["latents"])
    old = shards(store)[0]
    old.rename(old.with_name("shard-0123456789abcdef.safetensors"))
    assert torch.equal((anew(store).get(KEY) or {})["latents"], tensors["latents"])
    assert KEY in store


@pytest.mark.parametrize("length", [0, 1, 7, 8, 60, -1])
@pytest.mark.reliability_row(18)
def test_the_entries_of_a_truncated_shard_count_as_missing(store: TensorStore, length: int) -> None:
    put_example(store)
    shard = shards(store)[0]
    shard.write_bytes(shard.read_bytes()[:length])
    assert held(anew(store), [KEY]) == set()
    assert store.get(KEY) is None


@pytest.mark.reliability_row(18)
def test_a_damaged_entry_counts_as_missing_from_then_on_and_its_neighbours_do_not(
    store: TensorStore, caplog: pytest.LogCaptureFixture
) -> None:
    for key in (KEY, OTHER_KEY):
        store.put(key, {"a": torch.full((64,), 3.0)}, metadata={})
    store.flush()
    shard = shards(store)[0]
    data = bytearray(shard.read_bytes())
    data[data.index(torch.full((64,), 3.0).numpy().tobytes())] ^= 1
    shard.write_bytes(data)
    reader = anew(store)
    assert held(reader, [KEY, OTHER_KEY]) == {KEY, OTHER_KEY}
    with caplog.at_level(logging.WARNING):
        assert reader.get(KEY) is None
    assert KEY in caplog.text
    assert reader.get(OTHER_KEY) is not None
    assert held(anew(store), [KEY, OTHER_KEY]) == {OTHER_KEY}
    reader.put(KEY, {"a": torch.full((64,), 3.0)}, metadata={})
    reader.flush()
    assert KEY in anew(store)


@pytest.mark.reliability_row(18)
def test_no_flipped_byte_gives_other_tensors(store: TensorStore) -> None:
    tensors = put_example(store)
    shard = shards(store)[0]
    data = shard.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x11
        shard.write_bytes(flipped)
        shard.with_suffix(".damaged.json").unlink(missing_ok=True)
        entry = anew(store).get(KEY)
        assert entry is None or torch.equal(entry["latents"], tensors["latents"]), f"byte {place}"


@pytest.mark.reliability_row(18)
def test_two_writers_at_once_leave_whole_entries(store: TensorStore) -> None:
    stores = [anew(store) for _ in range(8)]
    writers = [threading.Thread(target=put_example, args=(each,)) for each in stores]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert KEY in anew(store)
    assert len(list(store.folder.iterdir())) == 8


@pytest.mark.reliability_row(26)
def test_damage_in_a_folder_that_cannot_be_written_is_known_in_this_run(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_example(store)
    shard = shards(store)[0]
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")

    def refuse(path: Path, data: bytes) -> None:
        raise StorageError(f"{path}: no permission")

    monkeypatch.setattr("simpletuner.helpers.caching.shard_folder.write_bytes", refuse)
    assert store.get(KEY) is None
    assert held(store, [KEY]) == set()


@pytest.mark.parametrize(
    "data",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        save({"latents": torch.ones(2)}),
        save({f"{KEY}.latents": torch.ones(2)}),
        save({f"{KEY}.latents": torch.ones(2), f"{KEY}.digest": torch.zeros(16, dtype=torch.uint8)}),
        (2).to_bytes(8, "little") + b"[]",
        with_header({"dtype": "U8", "shape": [-1]}),
        with_header({"dtype": "U8", "shape": [9], "data_offsets": [-9, 0]}),
        with_header({"dtype": "X", "shape": [16], "data_offsets": [0, 16]}),
    ],
    ids=["huge header", "no key", "no digest", "wrong digest", "list", "no offsets", "negative", "dtype"],
)
@pytest.mark.reliability_row(23)
def test_a_hostile_shard_is_refused(store: TensorStore, data: bytes) -> None:
    store.folder.mkdir()
    (store.folder / "shard-0123456789abcdef.safetensors").write_bytes(data)
    assert store.get(KEY) is None


def test_held_removes_the_partial_files_of_dead_writers(store: TensorStore) -> None:
    put_example(store)
    dead = store.folder / f".partial_{atomic._HOST}_{2**22 + 1}_00000000"
    dead.write_bytes(b"half")
    assert held(store, [KEY]) == {KEY}
    assert not dead.exists()


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_content_key_differs_whenever_a_part_or_its_end_differs(
    left: list[bytes], right: list[bytes]
) -> None:
    assert (content_key(*left) == content_key(*right)) == (left == right)


def test_content_key_is_the_same_on_every_machine() -> None:
    assert content_key("text", b"\x00", "ü") == content_key("text", "\0", "ü")
    assert content_key("cat") == xxhash.xxh3_128_hexdigest(b"3:cat")


def test_what_a_dead_writer_left_in_a_folder_that_cannot_be_written_stays(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(folder)

    put_example(store)
    monkeypatch.setattr(store_module, "remove_leftovers", refuse)
    assert held(anew(store), [KEY]) == {KEY}


def test_text_in_an_entry_shows_no_value_of_an_environment_variable(store: TensorStore) -> None:
    hide("a secret", "{env:KEY}")
    store.put(KEY, {"latents": torch.zeros(1)}, metadata={"prompt": "a secret cat"})
    store.flush()
    data = shards(store)[0].read_bytes()
    assert b"secret" not in data
    assert b"{env:KEY} cat" in data
    assert store.get(KEY) is not None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (rb"\"digest\",\"U8\",[16]", rb"\"digest\",\"F64\",[2]"),
        (rb"\"latents\",\"F32\",[2,3,4]", rb"\"latents\",\"F32\",[4.0]"),
    ],
    ids=["digest of floats", "shape of a float"],
)
def test_an_entry_with_a_hostile_layout_is_damaged(store: TensorStore, before: bytes, after: bytes) -> None:
    put_example(store)
    (shard,) = shards(store)
    data = shard.read_bytes()
    assert before in data
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(before, after).ljust(end - 8)
    shard.write_bytes(data[:8] + header + data[end:])
    assert anew(store).get(KEY) is None
