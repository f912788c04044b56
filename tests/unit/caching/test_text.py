"""What the cache holds of a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.helpers.caching.store import TensorStore
from simpletuner.helpers.caching.text import read_text, text_entry, text_key
from simpletuner.helpers.contracts import TextEmbeds

KEY = text_key("a cat", text_identity="clip")


@pytest.mark.parametrize("has_pooled", [True, False])
@pytest.mark.parametrize("has_mask", [True, False])
def test_embeddings_come_back_as_they_were(tmp_path: Path, has_pooled: bool, has_mask: bool) -> None:
    store = TensorStore(tmp_path)
    embeds = TextEmbeds(
        prompt_embeds=torch.randn(1, 4, 2).bfloat16(),
        pooled=torch.randn(1, 3) if has_pooled else None,
        attention_mask=torch.tensor([[True, True, False, False]]) if has_mask else None,
    )
    store.put(KEY, text_entry(embeds), metadata={})
    found = read_text(store, KEY)
    assert found is not None
    for name in ("prompt_embeds", "pooled", "attention_mask"):
        expected, value = getattr(embeds, name), getattr(found, name)
        assert (value is None) == (expected is None)
        assert value is None or (value.dtype == expected.dtype and torch.equal(value, expected))


def test_entry_holds_the_names_of_existing_caches() -> None:
    one = torch.ones(1, 1)
    assert set(text_entry(TextEmbeds(prompt_embeds=one, pooled=one, attention_mask=one))) == {
        "tokens",
        "pooled",
        "mask",
    }


def test_key_is_that_of_existing_caches_and_depends_on_prompt_and_encoder() -> None:
    assert text_key("a cät", text_identity="clip") == "fcdc7de1b0140ad344251dc62aeb5814"
    assert len({KEY, text_key("a dog", text_identity="clip"), text_key("a cat", text_identity="t5")}) == 3


def test_a_prompt_that_is_not_cached_is_none(tmp_path: Path) -> None:
    assert read_text(TensorStore(tmp_path), KEY) is None


def test_a_familys_own_tensors_come_back_beside_the_known_ones(tmp_path: Path) -> None:
    written = TextEmbeds(torch.ones(1, 4, 2), others={"glyphs": torch.full((1, 3), 7.0)})
    store = TensorStore(tmp_path)
    store.put(KEY, text_entry(written), metadata={})
    read = read_text(store, KEY)
    assert read is not None
    assert read.tensors().keys() == {"tokens", "glyphs"}
    assert torch.equal(read.others["glyphs"], written.others["glyphs"])
