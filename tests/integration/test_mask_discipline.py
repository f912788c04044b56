"""The life of the mask through a whole model: recompute, exceptions, threads, compiled graphs, cost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simpletuner.helpers.adapters.inference import load_into_pipeline
from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.adapters.tlora.layer import TLoraLayer
from tests.integration.tiny_pipelines import attach, load, sample, trained_adapter_file
from tests.integration.tiny_runs import tiny_model

TIMESTEPS = (900, 100, 500)


def adapted_unet(**options: Any) -> tuple[UNet2DConditionModel, LycorisAdapter]:
    pipeline = load(tiny_model())
    adapter = attach(pipeline, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trained = adapter.parameters()
    pipeline.unet.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    unet: UNet2DConditionModel = pipeline.unet
    return unet.train(), adapter


def loss(unet: Any, timesteps: Sequence[int] = TIMESTEPS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    size = len(timesteps)
    latents = torch.randn(size, 4, 8, 8, generator=generator)
    tokens = torch.randn(size, 7, 64, generator=generator)
    conditions = {"text_embeds": torch.ones(size, 32), "time_ids": torch.ones(size, 6)}
    output = unet(
        latents, torch.tensor(timesteps), encoder_hidden_states=tokens, added_cond_kwargs=conditions
    ).sample
    result: Tensor = output.square().mean()
    return result


def gradients(unet: Any, adapter: LycorisAdapter, timesteps: Sequence[int] = TIMESTEPS) -> list[Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    with adapter.rank_mask_for(timesteps):
        loss(unet, timesteps).backward()  # type: ignore[no-untyped-call]
    return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.reliability_row(10)
def test_recompute_of_either_kind_sees_the_mask_of_the_forward(reentrant: bool) -> None:
    unet, adapter = adapted_unet()
    expected = gradients(unet, adapter)
    unet.conv_in.requires_grad_(True)  # reentrant checkpoints need an input that asks for a gradient

    def recompute(module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(module, *inputs, use_reentrant=reentrant)

    unet.enable_gradient_checkpointing(gradient_checkpointing_func=recompute)
    close(gradients(unet, adapter), expected)


@pytest.mark.reliability_row(10)
def test_step_after_one_that_raised_is_not_touched_by_it() -> None:
    unet, adapter = adapted_unet()
    expected = gradients(unet, adapter)
    hook = unet.mid_block.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("inside")))
    with pytest.raises(KeyError, match="inside"):
        gradients(unet, adapter, (1, 2, 3))
    hook.remove()
    close(gradients(unet, adapter), expected)


def test_two_networks_of_one_model_train_under_their_own_schedules() -> None:
    unet, first = adapted_unet()
    alone = gradients(unet, first)
    second = attach(SimpleNamespace(unet=unet), linear_dim=4, tlora_min_rank=1)
    unet.train()
    for parameter in first.parameters():
        parameter.grad = None
    with first.rank_mask_for(TIMESTEPS), second.rank_mask_for(TIMESTEPS):
        loss(unet).backward()  # type: ignore[no-untyped-call]
    # The second begins at zero, so the first is trained as if it were alone.
    close([parameter.grad for parameter in first.parameters() if parameter.grad is not None], alone)
    assert second.schedule is not None
    highest = max(second.schedule.rank_at(timestep) for timestep in TIMESTEPS)
    assert highest < 4
    found = [layer.delta_p.grad for layer in second.network.loras]
    assert not any(gradient[:, highest:].any() for gradient in found)
    assert any(gradient[:, :highest].any() for gradient in found)


def test_two_pipelines_in_two_threads_make_what_each_makes_alone() -> None:
    pipelines = [load(tiny_model()), load(tiny_model())]
    files = [trained_adapter_file(), trained_adapter_file(linear_dim=4, linear_alpha=4.0)]
    for pipeline, file in zip(pipelines, files, strict=True):
        load_into_pipeline(pipeline, file)
    expected = [sample(pipeline, num_inference_steps=8) for pipeline in pipelines]
    made: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        made[index] = sample(pipelines[index], num_inference_steps=8)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(made[index], expected[index]) for index in range(2))


class Counting(TorchDispatchMode):
    """Counts the operators that read a value back to the host or move a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.moves = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        moves = func is torch.ops.aten._to_copy.default
        self.moves += moves and "device" in (kwargs or {})
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_read_nothing_back_and_move_no_mask_per_layer() -> None:
    unet, adapter = adapted_unet()
    adapter.detach()
    with Counting() as base:
        loss(unet)
    adapter._attach()
    with Counting() as counting, adapter.rank_mask_for(TIMESTEPS):
        loss(unet).backward()  # type: ignore[no-untyped-call]
    assert counting.reads == base.reads
    assert counting.moves == base.moves


def test_mask_is_a_fresh_tensor_for_every_step_and_shared_by_all_layers() -> None:
    unet, adapter = adapted_unet()
    seen: list[Tensor] = []
    layers = [module for module in unet.modules() if isinstance(module, TLoraLayer)]
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, *_: seen.append(mask.current_mask(layer.mask_group_id, layer.lora_dim))
        )
    kept = []
    for timesteps in (TIMESTEPS, (1, 2, 3)):
        gradients(unet, adapter, timesteps)
        assert len(seen) == len(layers)
        assert all(each is seen[0] for each in seen)
        kept.append((seen[0], seen[0].clone()))
        seen.clear()
    assert kept[0][0] is not kept[1][0]
    assert all(torch.equal(now, then) for now, then in kept), "a mask was changed in place"


def whole(unet: UNet2DConditionModel) -> None:
    unet.compile(backend="eager", fullgraph=True)


def blocks(unet: UNet2DConditionModel) -> None:
    unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [whole, blocks])
def test_compiled_training_step_gives_the_same_gradients_in_one_graph(
    compiled: Callable[[UNet2DConditionModel], None],
) -> None:
    torch.compiler.reset()
    unet, adapter = adapted_unet()
    many = [tuple((37 * step + shift) % 1001 for shift in (0, 300, 650)) for step in range(50)]
    expected = [gradients(unet, adapter, timesteps) for timesteps in (many[0], many[1], many[49])]
    compiled(unet)
    close(gradients(unet, adapter, many[0]), expected[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [gradients(unet, adapter, timesteps) for timesteps in many[1:]]
    close(found[0], expected[1])
    close(found[-1], expected[2])


@pytest.mark.gpu
@pytest.mark.reliability_row(10)
def test_recompute_on_autograds_own_threads_sees_the_mask() -> None:
    unet, adapter = adapted_unet()
    unet.cuda()

    def on_device(timesteps: Sequence[int]) -> list[Tensor]:
        with torch.device("cuda"):
            return gradients(unet, adapter, timesteps)

    expected = on_device(TIMESTEPS)
    unet.enable_gradient_checkpointing()
    close(on_device(TIMESTEPS), expected)
