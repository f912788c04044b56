"""Blocks that stay on the host: the same gradients, while weights of the host can be used for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.helpers.adapters.attachment import CHILD_PREFIX
from simpletuner.helpers.adapters.network import attach_adapter
from simpletuner.helpers.configuration.schema.adapter import AdapterConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.configuration.schema.sections import Precision, PrecisionConfig
from simpletuner.helpers.errors import ModelError
from simpletuner.helpers.models.flux.spec import SPEC as FLUX
from simpletuner.helpers.models.flux.tiny import make_transformer
from simpletuner.helpers.models.group_offload import offload_groups
from simpletuner.helpers.models.quantisation import quantize_and_move
from simpletuner.helpers.models.sdxl.spec import SPEC as SDXL
from simpletuner.helpers.models.sdxl.tiny import make_unet
from simpletuner.helpers.models.tiny_parts import fill_weights
from tests.integration.tiny_runs import TinyRun, gradients

CPU = torch.device("cpu")
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


class OnHost(Tensor):
    """A weight that can be copied to the device and used for nothing else, as one on another device."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> OnHost:
        return Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, strides=plain.stride())

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return OnHost(args[0].plain)
        if func is torch.ops.aten._to_copy.default:
            return func(args[0].plain, **(kwargs or {}))
        raise RuntimeError(f"{func} of a weight on the host")


def put_on_host(model: nn.Module, config: PrecisionConfig) -> int:
    """Make every weight that is to stay on the host unusable there; how many there are."""
    count, nested = 0, config.group_offload_type == "leaf_level"
    lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = lists if nested else lists & set(BLOCK_LISTS)
    for path, layer in model.named_modules():
        if not path.startswith(tuple(f"{each}." for each in lists)) or CHILD_PREFIX in path:
            continue
        for name, weight in list(layer.named_parameters(recurse=False)):
            if not weight.requires_grad and type(weight.data) is Tensor:
                layer.register_parameter(name, nn.Parameter(OnHost(weight.data), requires_grad=False))
                count += 1
    return count


def make_model(kind: str, precision: Precision = "no_change") -> nn.Module:
    model = make_unet() if kind == "unet" else make_transformer()
    fill_weights(model, seed=0)
    quantize_and_move(model, precision=precision, device=CPU).enable_gradient_checkpointing()
    return model.train()


def attach(model: nn.Module, algorithm: str) -> Any:
    spec = SDXL if "conv_in" in dict(model.named_children()) else FLUX
    if algorithm == "standard":
        return attach_adapter(model, AdapterConfig(lora_rank=4), lycoris=None, spec=spec, seed=0)
    values = {"algo": algorithm, "multiplier": 1.0, "linear_dim": 4, "linear_alpha": 4.0}
    lycoris = LycorisConfig.model_validate(
        values
        | {"apply_preset": {"target_module": ["Attention", "FeedForward"]}, "raw": values}
        | ({} if algorithm == "tlora" else {"extra": {"bypass_mode": True}})
    )
    return attach_adapter(model, AdapterConfig(lora_type="lycoris"), lycoris=lycoris, spec=spec, seed=0)


def step(model: nn.Module, adapter: Any) -> list[Tensor]:
    """Loss and gradients of one step; the adapter is moved along them."""
    random = torch.Generator().manual_seed(1)
    inputs: dict[str, Any]
    if "conv_in" in dict(model.named_children()):
        added = {"text_embeds": torch.randn(2, 32, generator=random), "time_ids": torch.ones(2, 6)}
        inputs = {
            "sample": torch.randn(2, 4, 8, 8, generator=random),
            "timestep": torch.tensor([300, 700]),
            "encoder_hidden_states": torch.randn(2, 77, 64, generator=random),
            "added_cond_kwargs": added,
        }
    else:
        inputs = {
            "hidden_states": torch.randn(2, 4, 16, generator=random),
            "encoder_hidden_states": torch.randn(2, 6, 32, generator=random),
            "pooled_projections": torch.randn(2, 32, generator=random),
            "timestep": torch.tensor([0.3, 0.7]),
            "guidance": torch.ones(2),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    ranks = adapter.rank_mask_for([300, 700]) if adapter.algorithm == "tlora" else nullcontext()
    with ranks:
        loss = model(**inputs).sample.square().mean()
        loss.backward()
    found = [loss.detach()]
    with torch.no_grad():
        for parameter in adapter.parameters():
            found.append(parameter.grad.clone())
            parameter.sub_(parameter.grad)
            parameter.grad = None
    return found


@pytest.mark.parametrize("algorithm", ["tlora", "loha", "standard"])
@pytest.mark.parametrize(
    ("kind", "offload"),
    [
        ("unet", {"group_offload_type": "leaf_level"}),
        ("transformer", {"group_offload_type": "leaf_level"}),
        ("transformer", {}),
        ("transformer", {"group_offload_blocks_per_group": 2}),
    ],
)
def test_two_steps_are_those_of_the_whole_model_to_the_last_bit(
    kind: str, offload: dict[str, Any], algorithm: str
) -> None:
    config = PrecisionConfig(enable_group_offload=True, **offload)
    whole = make_model(kind)
    adapter = attach(whole, algorithm)
    expected = [step(whole, adapter) for _ in range(2)]
    model = make_model(kind)
    adapter = attach(model, algorithm)
    assert put_on_host(model, config) > 50
    offload_groups(model, config, device=CPU)
    found = [step(model, adapter) for _ in range(2)]
    for tensors, references in zip(found, expected, strict=True):
        assert len(tensors) == len(references) > 10
        assert all(torch.equal(*pair) for pair in zip(tensors, references, strict=True))


def test_quantised_weights_stay_on_the_host_too() -> None:
    config = PrecisionConfig(enable_group_offload=True, group_offload_type="leaf_level")
    whole = make_model("unet", "int8-torchao")
    adapter = attach(whole, "tlora")
    expected = step(whole, adapter)
    model = make_model("unet", "int8-torchao")
    adapter = attach(model, "tlora")
    put_on_host(model, config)
    offload_groups(model, config, device=CPU)
    assert all(torch.equal(*pair) for pair in zip(step(model, adapter), expected, strict=True))


def test_at_most_one_group_is_on_the_device_between_forwards() -> None:
    model = make_model("transformer")
    config = PrecisionConfig(enable_group_offload=True)
    adapter = attach(model, "tlora")
    put_on_host(model, config)
    offload_groups(model, config, device=CPU)
    step(model, adapter)
    present = {
        ".".join(path.split(".")[:2])
        for path, weight in model.named_parameters()
        if path.startswith(BLOCK_LISTS) and not weight.requires_grad and type(weight.data) is Tensor
    }
    assert present == {"transformer_blocks.0"}, "the block whose backward ran last"
    kept = [path for path, weight in model.named_parameters() if not path.startswith(BLOCK_LISTS)]
    assert all(type(model.get_parameter(path).data) is Tensor for path in kept)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Linear has no list of blocks.*enable_group_offload"):
        offload_groups(nn.Linear(4, 4), PrecisionConfig(enable_group_offload=True), device=CPU)


@pytest.mark.parametrize("precision", ["no_change", "int8-torchao"])
def test_run_with_offload_is_the_run_without_it(tmp_path: Path, precision: str) -> None:
    keys = {"base_model_precision": precision, "gradient_checkpointing": True}
    offload = {"enable_group_offload": True, "group_offload_type": "leaf_level"}
    digests = []
    for name, more in (("whole", {}), ("offloaded", offload)):
        run = TinyRun(tmp_path / name, keys=keys | more)
        with run.trainer() as trainer:
            (batch,) = [next(iter(trainer.data.batches(start=0)))]
            trainer.train_step(batch)
            digests.append(gradients(trainer))
        assert run.run() == 0
        digests[-1].append(torch.tensor([line["loss"] for line in run.log()]))
    # A CPU rounds by where in memory a weight begins, and a copy begins elsewhere than one in a mapped file.
    for expected, found in zip(*digests, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_offloaded_run_makes_pictures(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, keys={"enable_group_offload": True, "group_offload_type": "leaf_level"})
    pictures = {"validation_prompt": "a cat", "validation_resolution": "64x64"}
    run.run(validation_disable=False, validation_num_inference_steps=2, **pictures)
    assert (run.output_dir / "validation" / "step-4" / "grid.png").is_file()
