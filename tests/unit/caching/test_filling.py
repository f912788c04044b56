"""Each missing entry is encoded once, in batches of one group, and the work is divided between processes."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.caching.filling import CacheRequest, encode_missing
from simpletuner.helpers.caching.prefetch import LoaderWatch
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.errors import DataError, LoaderTimeoutError
from simpletuner.helpers.io import atomic


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path)


class Encoder:
    """Doubles numbers, and keeps the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, numbers: list[int]) -> list[dict[str, Tensor]]:
        self.batches.append(numbers)
        return [{"doubled": torch.tensor([2.0 * number])} for number in numbers]


def request(store: TensorStore, number: int, *, group: str = "") -> CacheRequest[int]:
    return CacheRequest(
        store=store,
        key=content_key(str(number)),
        name=f"{number}.png",
        encoder="VAE",
        metadata={"image": f"{number}.png"},
        load=lambda: number,
        batch_group=group,
    )


def encoded(
    requests: list[CacheRequest[int]], *, batch_size: int = 2, shard: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    """The batches that were encoded."""
    encode = Encoder()
    list(encode_missing(requests, encode, batch_size=batch_size, shard=shard))
    return encode.batches


def test_each_entry_is_encoded_once_and_reads_back_the_same(store: TensorStore) -> None:
    requests = [request(store, number) for number in range(5)]
    assert encoded(requests) == [[0, 1], [2, 3], [4]]
    assert encoded(requests) == []
    assert store.get(requests[3].key) == {"doubled": torch.tensor([6.0])}


def test_a_batch_never_mixes_groups(store: TensorStore) -> None:
    requests = [request(store, number, group="wide" if number < 3 else "tall") for number in range(6)]
    assert encoded(requests, batch_size=4) == [[0, 1, 2], [3, 4, 5]]


def test_two_requests_of_one_key_are_encoded_once(store: TensorStore, tmp_path: Path) -> None:
    same_folder, other_folder = TensorStore(tmp_path), TensorStore(tmp_path / "other")
    requests = [request(each, 1) for each in (store, store, same_folder, other_folder)]
    assert encoded(requests, batch_size=4) == [[1, 1]]
    assert all(each.key in each.store for each in requests)


def test_a_damaged_entry_is_encoded_again_once_it_was_read(store: TensorStore) -> None:
    requests = [request(store, 1), request(store, 2), replace(request(store, 3), is_read_at_once=True)]
    encoded(requests)
    shard = next(store.folder.glob("shard-*"))
    data = shard.read_bytes()
    for number in (1, 3):
        value = torch.tensor([2.0 * number]).numpy().tobytes()
        data = data.replace(value, bytes(len(value)))
    shard.write_bytes(data)
    later = [replace(each, store=TensorStore(store.folder)) for each in requests]
    assert encoded(later) == [[3]]
    assert later[0].store.get(later[0].key) is None
    assert encoded(later) == [[1]]
    assert all(each.key in each.store for each in later)


def test_entries_that_were_encoded_before_an_error_are_on_disk(store: TensorStore) -> None:
    def encode(numbers: list[int]) -> list[dict[str, Tensor]]:
        if 2 in numbers:
            raise DataError("stopped")
        return Encoder()(numbers)

    requests = [request(store, number) for number in range(3)]
    with pytest.raises(DataError, match="stopped"):
        list(encode_missing(requests, encode, batch_size=1))
    assert [each.key in TensorStore(store.folder) for each in requests] == [True, True, False]


def test_processes_divide_the_work(store: TensorStore) -> None:
    requests = [request(store, number) for number in (0, 0, 1, 2, 3, 4, 5, 6)]
    parts = [encoded(requests, shard=(index, 3)) for index in range(3)]
    assert parts == [[[0, 3], [6]], [[1, 4]], [[2, 5]]]
    assert all(each.key in store for each in requests)


def test_progress_counts_the_missing_entries(store: TensorStore) -> None:
    requests = [request(store, number) for number in range(5)]
    encoded(requests[:2])
    assert list(encode_missing(requests, Encoder(), batch_size=2)) == [(2, 3), (3, 3)]


def test_an_input_that_is_unusable_makes_no_entry_and_the_others_of_its_batch_do(store: TensorStore) -> None:
    requests = [request(store, number) for number in range(4)]
    for number in (1, 2, 3):
        requests[number] = replace(requests[number], load=lambda: None)
    encode = Encoder()
    assert list(encode_missing(requests, encode, batch_size=2)) == [(1, 4), (1, 4)]
    assert encode.batches == [[0]]
    assert [each.key in store for each in requests] == [True, False, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.reliability_row(12)
def test_values_that_are_not_finite_are_refused_by_name(store: TensorStore, value: float) -> None:
    def encode(numbers: list[int]) -> list[dict[str, Tensor]]:
        return [{"whole": torch.ones(2), "broken": torch.tensor([1.0, value])} for _ in numbers]

    with pytest.raises(DataError, match=r"1\.png.*not finite"):
        list(encode_missing([request(store, 1)], encode, batch_size=1))
    assert request(store, 1).key not in store


def test_an_input_that_cannot_be_loaded_ends_the_filling_and_keeps_earlier_entries(
    store: TensorStore,
) -> None:
    def fail() -> int:
        raise DataError("gone")

    broken = CacheRequest(
        store=store, key=content_key("broken"), name="broken.png", encoder="VAE", metadata={}, load=fail
    )
    with pytest.raises(DataError, match="gone"):
        encoded([request(store, 1), broken], batch_size=1)
    assert request(store, 1).key in store


def test_filling_removes_the_partial_files_of_dead_writers(store: TensorStore) -> None:
    dead = store.folder / f".partial_{atomic._HOST}_{2**22 + 1}_00000000"
    dead.write_bytes(b"half")
    encoded([request(store, 1)])
    assert not dead.exists()


@pytest.mark.reliability_row(31)
def test_input_that_never_loads_is_named(store: TensorStore) -> None:
    released = threading.Event()
    hanging = replace(request(store, 2), load=lambda: 2 if released.wait() else None)
    watch = LoaderWatch(timeout_s=0.1)
    with pytest.raises(LoaderTimeoutError, match=r"2\.png"):
        list(encode_missing([request(store, 1), hanging], Encoder(), batch_size=1, watch=watch))
    released.set()
    assert request(store, 1).key in store
