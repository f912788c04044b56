"""Named tensors of encoded prompts, and the models that take reference images."""

from __future__ import annotations

import pytest
import torch

from simpletuner.helpers.contracts import ModelSpec, TextEmbeds

BARE = TextEmbeds(torch.full((1, 4, 2), 1.0))
WHOLE = TextEmbeds(
    torch.full((1, 4, 2), 2.0),
    pooled=torch.full((1, 3), 3.0),
    attention_mask=torch.tensor([[True, True, False, False]]),
    others={"glyphs": torch.full((1, 5), 4.0)},
)


def test_tensors_have_the_names_of_cache_files_and_only_those_that_are_there() -> None:
    assert WHOLE.tensors().keys() == {"tokens", "pooled", "mask", "glyphs"}
    assert BARE.tensors().keys() == {"tokens"}
    assert WHOLE.tensors()["tokens"] is WHOLE.prompt_embeds
    assert WHOLE.tensors()["pooled"] is WHOLE.pooled
    assert WHOLE.tensors()["mask"] is WHOLE.attention_mask


@pytest.mark.parametrize("text", [BARE, WHOLE], ids=["bare", "whole"])
def test_from_tensors_is_the_inverse_of_tensors(text: TextEmbeds) -> None:
    assert TextEmbeds.from_tensors(text.tensors()) == text


def test_stack_joins_every_tensor_along_the_batch() -> None:
    other = TextEmbeds.from_tensors(
        {name: torch.zeros_like(tensor) for name, tensor in WHOLE.tensors().items()}
    )
    stacked = TextEmbeds.stack([WHOLE, other])
    for name, tensor in stacked.tensors().items():
        assert torch.equal(tensor, torch.cat([WHOLE.tensors()[name], other.tensors()[name]])), name
    assert stacked.tensors().keys() == WHOLE.tensors().keys()
    assert stacked.attention_mask is not None
    assert stacked.attention_mask.dtype == torch.bool
    assert TextEmbeds.stack([BARE]).pooled is None


@pytest.mark.parametrize("texts", [[BARE, WHOLE], [WHOLE, BARE]], ids=["more", "less"])
def test_stack_refuses_prompts_with_different_tensors(texts: list[TextEmbeds]) -> None:
    with pytest.raises(AssertionError):
        TextEmbeds.stack(texts)


def test_each_changes_every_tensor() -> None:
    moved = WHOLE.each(lambda tensor: tensor.to("meta"))
    assert moved.tensors().keys() == WHOLE.tensors().keys()
    assert all(tensor.is_meta for tensor in moved.tensors().values())


@pytest.mark.parametrize(
    ("flavour", "repository", "expected"),
    [
        ("edit", "somebody/plain", True),
        ("plain", "somebody/edit", False),
        (None, "somebody/edit", True),
        (None, "somebody/plain", False),
        (None, "a/folder", False),
    ],
)
def test_a_model_takes_references_by_its_flavour_else_its_repository(
    flavour: str | None, repository: str, expected: bool
) -> None:
    spec = ModelSpec(
        name="toy",
        flavours={"plain": "somebody/plain", "edit": "somebody/edit"},
        default_flavour="plain",
        prediction_types=("flow_matching",),
        pixel_alignment=16,
        minimum_alignment=16,
        default_resolution=64,
        lora_targets=("to_q",),
        reference_flavours=frozenset({"edit"}),
    )
    assert spec.sees_references(flavour, repository) is expected
