"""Token routing against the blocks run one by one on the tokens that it keeps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

from simpletuner.helpers.configuration.schema.token_routing import TreadConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.flux import tiny as flux_tiny
from simpletuner.helpers.models.flux2 import tiny as flux2_tiny
from simpletuner.helpers.models.token_routing import TokenRouting, spans_of

NUM_TEXT, NUM_IMAGE, NUM_BLOCKS = 3, 8, 4


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return flux_tiny.make_transformer(has_guidance=False)


def flux2() -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return flux2_tiny.make_transformer(guidance_embeds=False)


def config_of(*routes: tuple[float, int, int]) -> TreadConfig:
    keys = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    return TreadConfig.model_validate({"routes": [dict(zip(keys, route, strict=True)) for route in routes]})


def inputs_of(transformer: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    is_first, config = isinstance(transformer, FluxTransformer2DModel), transformer.config
    axes = 3 if is_first else 4
    return {
        "hidden_states": normal(2, NUM_IMAGE, config.in_channels),
        "encoder_hidden_states": normal(2, NUM_TEXT, config.joint_attention_dim),
        "timestep": torch.tensor([0.3, 0.7]),
        "txt_ids": torch.zeros(NUM_TEXT, axes),
        "img_ids": torch.arange(NUM_IMAGE * axes).view(NUM_IMAGE, axes).float(),
        **({"pooled_projections": normal(2, config.pooled_projection_dim)} if is_first else {}),
    }


class Recorder:
    """Inputs and outputs of every block, in the order of the forward pass."""

    def __init__(self, transformer: Any) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(lambda block, args, output: self.outputs.append(output))

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(kwargs)

    def image_tokens(self, index: int) -> Tensor:
        """[B, N, D] image tokens that leave a block."""
        output = self.outputs[index]
        return output[:, NUM_TEXT:] if isinstance(output, Tensor) else output[1]


def test_tokens_that_pass_by_come_out_as_they_went_in_and_the_others_meet_only_themselves() -> None:
    transformer = flux()
    routing = TokenRouting(transformer, config_of((0.5, 1, 2)), seed=3)
    seen = Recorder(transformer)
    with routing.routed(7):
        transformer(**inputs_of(transformer))
    before, after = seen.image_tokens(0), seen.image_tokens(2)
    moved = (before != after).any(dim=(0, 2))
    kept = moved.nonzero().flatten()
    assert len(kept) == NUM_IMAGE // 2

    # The same blocks by hand, on the kept tokens with their own positions.
    text_before = seen.outputs[0][0]
    rotary = transformer.pos_embed(
        torch.cat([torch.zeros(NUM_TEXT, 3), inputs_of(transformer)["img_ids"][kept]])
    )
    temb = seen.inputs[1]["temb"]
    with torch.no_grad():
        for module in transformer.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        text, image = transformer.transformer_blocks[1](before[:, kept], text_before, temb, rotary)
        text, image = transformer.single_transformer_blocks[0](image, text, temb, rotary)
    assert torch.equal(after[:, kept], image)
    assert torch.equal(seen.outputs[2][0], text)


@pytest.mark.parametrize("make", [flux, flux2], ids=["flux", "flux2"])
@pytest.mark.parametrize("route", [(0, 1), (1, 2), (2, 3), (-1, -1), (0, -1)], ids=str)
def test_a_share_of_the_tokens_passes_every_span_of_blocks(make: Any, route: tuple[int, int]) -> None:
    transformer = make()
    routing = TokenRouting(transformer, config_of((0.25, *route)), seed=3)
    seen = Recorder(transformer)
    start = route[0] % NUM_BLOCKS
    with routing.routed(7):
        plain = transformer(**inputs_of(transformer)).sample
    if start > 0:
        moved = (seen.image_tokens(start - 1) != seen.image_tokens(route[1] % NUM_BLOCKS)).any(dim=(0, 2))
        assert int(moved.sum()) == NUM_IMAGE * 3 // 4
    assert plain.shape == inputs_of(transformer)["hidden_states"].shape


@pytest.mark.parametrize("make", [flux, flux2], ids=["flux", "flux2"])
def test_outside_of_training_nothing_is_routed(make: Any) -> None:
    plain, routed = make(), make()
    routing = TokenRouting(routed, config_of((0.5, 1, -1)), seed=3)
    expected = plain(**inputs_of(plain)).sample
    assert torch.equal(routed(**inputs_of(routed)).sample, expected)
    with routing.routed(7):
        assert not torch.equal(routed(**inputs_of(routed)).sample, expected)
    assert torch.equal(routed(**inputs_of(routed)).sample, expected)


@pytest.mark.parametrize("make", [flux, flux2], ids=["flux", "flux2"])
def test_gradient_checkpointing_routes_the_same_tokens_again(make: Any) -> None:
    gradients = []
    for recompute in (False, True):
        transformer = make()
        if recompute:
            transformer.enable_gradient_checkpointing()
        routing = TokenRouting(transformer, config_of((0.5, 0, 1), (0.25, 2, 3)), seed=3)
        with routing.routed(7):
            transformer(**inputs_of(transformer)).sample.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in transformer.named_parameters()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_the_choice_depends_on_seed_and_sample_only() -> None:
    def sample(seed: int, index: int) -> Tensor:
        transformer = flux()
        routing = TokenRouting(transformer, config_of((0.5, 1, 2)), seed=seed)
        with torch.no_grad(), routing.routed(index):
            return transformer(**inputs_of(transformer)).sample

    assert torch.equal(sample(3, 7), sample(3, 7))
    assert not torch.equal(sample(3, 7), sample(3, 8))
    assert not torch.equal(sample(3, 7), sample(4, 7))


def test_an_attention_mask_follows_the_tokens() -> None:
    """Without a word of text in sight, a prompt has no effect."""
    mask = torch.ones(2, 1, 1, NUM_TEXT + NUM_IMAGE, dtype=torch.bool)
    mask[..., :NUM_TEXT] = False
    transformer = flux()
    routing = TokenRouting(transformer, config_of((0.5, 0, -1)), seed=3)
    inputs = inputs_of(transformer)
    samples = []
    for factor in (1.0, -2.0):
        text = inputs["encoder_hidden_states"] * factor
        attention = {"attention_mask": mask}
        with torch.no_grad(), routing.routed(7):
            routed = inputs | {"encoder_hidden_states": text, "joint_attention_kwargs": attention}
            samples.append(transformer(**routed).sample)
    assert torch.equal(*samples)


def test_no_token_is_lost_when_nearly_all_pass_by() -> None:
    transformer = flux()
    routing = TokenRouting(transformer, config_of((0.999, 1, 2)), seed=3)
    seen = Recorder(transformer)
    with routing.routed(7):
        transformer(**inputs_of(transformer))
    moved = (seen.image_tokens(0) != seen.image_tokens(2)).any(dim=(0, 2))
    assert int(moved.sum()) == 1


def test_spans_count_from_the_end_and_come_in_order() -> None:
    spans = spans_of(config_of((0.5, -2, -1), (0.25, 0, 1)), num_blocks=57)
    assert [(each.start, each.end, each.share) for each in spans] == [(0, 1, 0.25), (55, 56, 0.5)]


@pytest.mark.parametrize(
    "routes",
    [[(0.5, 0, 57)], [(0.5, -58, 3)], [(0.5, 50, -10)], [(0.5, 2, 8), (0.3, 8, 9)]],
    ids=["beyond the end", "before the start", "end before start", "shared block"],
)
def test_routes_that_do_not_fit_the_transformer_are_refused(routes: list[tuple[float, int, int]]) -> None:
    with pytest.raises(ModelError, match="57 blocks"):
        spans_of(config_of(*routes), num_blocks=57)


def test_no_state_is_held_after_a_micro_batch() -> None:
    transformer = flux()
    routing = TokenRouting(transformer, config_of((0.5, 1, 2)), seed=3)
    with routing.routed(7), nullcontext():
        transformer(**inputs_of(transformer))
        assert routing._micro_batch.tokens
    assert not routing._micro_batch.tokens
