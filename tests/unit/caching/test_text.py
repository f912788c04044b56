"""Prompt embeddings are encoded once per prompt and encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.caching.text import TextCache
from simpletuner.helpers.contracts import TextEmbeds
from simpletuner.helpers.errors import DataError


def encode(prompts: Sequence[str]) -> list[TextEmbeds]:
    return [
        TextEmbeds(prompt_embeds=torch.full((1, 4, 2), float(len(prompt))), pooled=torch.full((1, 3), 1.0))
        for prompt in prompts
    ]


def test_fill_encodes_each_prompt_once_and_gives_it_back(tmp_path: Path) -> None:
    cache = TextCache(TensorStore(tmp_path), identity="clip")
    assert cache.fill(["cat", "", "cat", "a dog"], encode, batch_size=2) == 3
    assert cache.fill(["cat", "a horse"], encode, batch_size=2) == 1
    embeds = cache.get("a dog")
    assert embeds is not None
    assert torch.equal(embeds.prompt_embeds, torch.full((1, 4, 2), 5.0))
    assert embeds.pooled is not None
    assert embeds.attention_mask is None
    assert cache.get("never seen") is None


def test_a_prompt_of_another_encoder_is_another_entry(tmp_path: Path) -> None:
    TextCache(TensorStore(tmp_path), identity="clip").fill(["cat"], encode, batch_size=1)
    assert TextCache(TensorStore(tmp_path), identity="t5").get("cat") is None


def test_fill_shares_the_work_and_reports_progress(tmp_path: Path) -> None:
    cache = TextCache(TensorStore(tmp_path), identity="clip")
    seen: list[tuple[int, int]] = []
    prompts = [f"prompt {number}" for number in range(5)]
    for index in range(2):
        cache.fill(
            prompts,
            encode,
            batch_size=2,
            shard=(index, 2),
            on_progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(2, 3), (3, 3), (2, 2)]
    assert all(cache.get(prompt) for prompt in prompts)


def test_row_12_an_embedding_that_is_not_finite_is_refused_by_prompt(tmp_path: Path) -> None:
    def overflow(prompts: Sequence[str]) -> list[TextEmbeds]:
        return [TextEmbeds(prompt_embeds=torch.full((1, 4, 2), float("nan"))) for _ in prompts]

    with pytest.raises(DataError, match=r"'a cat'.*not finite"):
        TextCache(TensorStore(tmp_path), identity="clip").fill(["a cat"], overflow, batch_size=1)


def test_a_familys_own_tensors_come_back_beside_the_known_ones(tmp_path: Path) -> None:
    written = TextEmbeds(torch.ones(1, 4, 2), others={"glyphs": torch.full((1, 3), 7.0)})
    cache = TextCache(TensorStore(tmp_path), identity="clip")
    cache.fill(["cat"], lambda _: [written], batch_size=1)
    read = cache.get("cat")
    assert read is not None
    assert read.tensors().keys() == {"tokens", "glyphs"}
    assert torch.equal(read.others["glyphs"], written.others["glyphs"])
