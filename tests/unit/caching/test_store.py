"""Tensors under content keys: what comes back is what was put, or nothing."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from simpletuner.helpers.caching import store as store_module
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.errors import DataError
from simpletuner.helpers.io import atomic
from simpletuner.helpers.io.redaction import hide

KEY, OTHER_KEY = content_key("one"), content_key("other")


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path / "cache")


def put_example(store: TensorStore) -> dict[str, Tensor]:
    tensors = {"latents": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)}
    store.put(KEY, tensors, metadata={"image": "cat.png"})
    return tensors


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 8, 8),
        torch.randn(4, 8).to(torch.bfloat16),
        torch.randn(4, 8).half(),
        torch.tensor([True, False]),
        torch.tensor(1.5),
        torch.empty(0, 4),
        torch.randn(4, 6).T,
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_get_gives_what_was_put_for_every_kind_of_tensor(store: TensorStore, tensor: Tensor) -> None:
    store.put(KEY, {"a": tensor, "b": torch.ones(2)}, metadata={})
    entry = store.get(KEY)
    assert entry is not None
    assert entry["a"].dtype == tensor.dtype
    assert torch.equal(entry["a"], tensor)


def test_get_of_a_missing_key_is_none(store: TensorStore) -> None:
    assert store.get(KEY) is None
    assert KEY not in store


@pytest.mark.parametrize("length", [0, 1, 7, 8, 60, -1])
@pytest.mark.reliability_row(18)
def test_a_truncated_entry_is_removed_and_counts_as_missing(store: TensorStore, length: int) -> None:
    put_example(store)
    data = store.path(KEY).read_bytes()
    store.path(KEY).write_bytes(data[:length])
    assert store.get(KEY) is None
    assert not store.path(KEY).exists()


@pytest.mark.reliability_row(18)
def test_a_damaged_entry_that_another_process_removes_first_counts_as_missing(store: TensorStore) -> None:
    put_example(store)
    store.path(KEY).write_bytes(b"damaged")

    class OtherProcess(logging.Handler):
        """Removes the entry once it is reported, before this process does."""

        def emit(self, _: logging.LogRecord) -> None:
            store.path(KEY).unlink()

    other = OtherProcess()
    store_module.logger.addHandler(other)
    try:
        assert store.get(KEY) is None
    finally:
        store_module.logger.removeHandler(other)


@pytest.mark.reliability_row(18)
def test_no_flipped_byte_gives_other_tensors(store: TensorStore) -> None:
    tensors = put_example(store)
    data = store.path(KEY).read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 0x11
        store.path(KEY).write_bytes(flipped)
        entry = store.get(KEY)
        assert entry is None or torch.equal(entry["latents"], tensors["latents"]), f"byte {place}"
    store.path(KEY).unlink(missing_ok=True)


@pytest.mark.reliability_row(18)
def test_an_entry_under_another_key_is_refused(store: TensorStore) -> None:
    put_example(store)
    store.path(OTHER_KEY).parent.mkdir(parents=True, exist_ok=True)
    store.path(KEY).rename(store.path(OTHER_KEY))
    assert store.get(OTHER_KEY) is None


@pytest.mark.reliability_row(18)
def test_two_writers_at_once_leave_a_whole_entry(store: TensorStore) -> None:
    writers = [threading.Thread(target=put_example, args=(store,)) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert KEY in store
    assert [file.name for file in store.path(KEY).parent.iterdir()] == [store.path(KEY).name]


@pytest.mark.reliability_row(22)
def test_a_pickle_under_an_entry_name_is_not_executed(store: TensorStore, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    store.path(KEY).parent.mkdir(parents=True)
    store.path(KEY).write_bytes(pickle.dumps(Evil()))
    assert store.get(KEY) is None
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
def test_a_hostile_entry_is_refused(store: TensorStore, data: bytes) -> None:
    store.path(KEY).parent.mkdir(parents=True)
    store.path(KEY).write_bytes(data)
    assert store.get(KEY) is None


def test_an_entry_that_is_a_folder_is_an_error_that_names_it(store: TensorStore) -> None:
    store.path(KEY).mkdir(parents=True)
    with pytest.raises(DataError, match=KEY):
        store.get(KEY)


def test_remove_stale_removes_the_partial_files_of_dead_writers(store: TensorStore) -> None:
    put_example(store)
    folder = store.path(KEY).parent
    dead = folder / f".partial_{atomic._HOST}_{2**22 + 1}_00000000"
    dead.write_bytes(b"half")
    store.remove_stale()
    assert not dead.exists()
    assert KEY in store


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_content_key_differs_whenever_a_part_or_its_end_differs(
    left: list[bytes], right: list[bytes]
) -> None:
    assert (content_key(*left) == content_key(*right)) == (left == right)


def test_content_key_is_the_same_on_every_machine() -> None:
    assert content_key("text", b"\x00", "ü") == content_key("text", "\0", "ü")
    assert content_key("cat") == xxhash.xxh3_128_hexdigest(b"3:cat")


def test_text_in_an_entry_shows_no_value_of_an_environment_variable(store: TensorStore) -> None:
    hide("a secret", "{env:KEY}")
    store.put(KEY, {"latents": torch.zeros(1)}, metadata={"prompt": "a secret cat"})
    data = store.path(KEY).read_bytes()
    assert b"secret" not in data
    assert b"{env:KEY} cat" in data
    assert store.get(KEY) is not None
