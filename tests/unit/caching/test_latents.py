"""Latents are encoded once, in batches of one size, and shared out between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from simpletuner.helpers.caching.latents import LatentRequest, fill_latents, read_latents
from simpletuner.helpers.caching.store import TensorStore, content_key
from simpletuner.helpers.contracts import Size
from simpletuner.helpers.errors import DataError


@pytest.fixture
def store(tmp_path: Path) -> TensorStore:
    return TensorStore(tmp_path)


class Encoder:
    """Means over 8 x 8 pixels, and the batches it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels, 8)


SQUARE = Size(16, 16)


def request(number: int, size: Size = SQUARE) -> LatentRequest:
    return LatentRequest(
        key=content_key(str(number)),
        name=f"{number}.png",
        size=size,
        load=lambda: torch.full((3, size.height, size.width), number / 10),
    )


def test_fill_latents_encodes_each_image_once_and_reads_back_the_same(store: TensorStore) -> None:
    requests = [request(number) for number in range(5)]
    encode = Encoder()
    assert fill_latents(store, requests, encode=encode, batch_size=2) == 5
    assert [shape[0] for shape in encode.shapes] == [2, 2, 1]
    assert fill_latents(store, requests, encode=encode, batch_size=2) == 0
    latents = read_latents(store, requests[3].key)
    assert latents is not None
    torch.testing.assert_close(latents, torch.full((3, 2, 2), 0.3))


def test_fill_latents_never_mixes_sizes_in_a_batch(store: TensorStore) -> None:
    requests = [request(number, Size(16, 16 + 16 * (number % 2))) for number in range(6)]
    encode = Encoder()
    fill_latents(store, requests, encode=encode, batch_size=4)
    assert encode.shapes == [(3, 3, 16, 16), (3, 3, 16, 32)]


def test_fill_latents_encodes_two_requests_of_one_key_once(store: TensorStore) -> None:
    assert fill_latents(store, [request(1), request(1)], encode=Encoder(), batch_size=4) == 1


def test_fill_latents_remakes_a_damaged_entry(store: TensorStore) -> None:
    requests = [request(1), request(2)]
    fill_latents(store, requests, encode=Encoder(), batch_size=2)
    store.path(requests[0].key).write_bytes(b"damaged")
    assert fill_latents(store, requests, encode=Encoder(), batch_size=2) == 1
    assert read_latents(store, requests[0].key) is not None


def test_fill_latents_shares_the_work_between_processes(store: TensorStore) -> None:
    requests = [request(number) for number in range(7)]
    counts = [fill_latents(store, requests, encode=Encoder(), batch_size=2, shard=(i, 3)) for i in range(3)]
    assert counts == [3, 2, 2]
    assert all(each.key in store for each in requests)


def test_fill_latents_reports_progress_over_all(store: TensorStore) -> None:
    requests = [request(number) for number in range(5)]
    fill_latents(store, requests[:2], encode=Encoder(), batch_size=2)
    seen: list[tuple[int, int]] = []
    fill_latents(
        store,
        requests,
        encode=Encoder(),
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 5), (5, 5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.reliability_row(12)
def test_latents_that_are_not_finite_are_refused_by_name(store: TensorStore, value: float) -> None:
    with pytest.raises(DataError, match=r"1\.png.*not finite"):
        fill_latents(store, [request(1)], encode=lambda pixels: pixels * value, batch_size=1)
    assert request(1).key not in store


def test_an_image_that_cannot_be_loaded_ends_the_filling_and_keeps_what_was_done(store: TensorStore) -> None:
    def fail() -> Tensor:
        raise DataError("gone")

    broken = LatentRequest(key=content_key("broken"), name="broken.png", size=Size(16, 16), load=fail)
    with pytest.raises(DataError, match="gone"):
        fill_latents(store, [request(1), broken], encode=Encoder(), batch_size=1)
    assert request(1).key in store
