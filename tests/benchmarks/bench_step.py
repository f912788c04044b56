"""B2: a training step of Flux.1's blocks at real width: ours, PEFT, and the bare frozen model.

    python tests/benchmarks/bench_step.py [--quick] [--checkpointing]
    python tests/benchmarks/bench_step.py --device cuda --double 19 --single 38 --edge 64 --dtype bf16

The second line is Flux.1 at 1024 px, for a GPU. A step is forward, backward and fused AdamW; the frozen
model's has no optimiser, and its input asks for the gradient. Contenders share the frozen weights. Before the
timing, the gradients of a masked step with gradient checkpointing are compared with those without.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.flow_matching import timestep_input
from simpletuner.helpers.models.flux.family import image_ids
from simpletuner.helpers.models.flux.spec import SPEC

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRESET = {"target_module": ["Attention", "FeedForward"]}
TEXT_TOKENS = 512
LEARNING_RATE = 1e-4


def main() -> None:
    """Check the gradients, then time the steps."""
    options = parse()
    device = torch.device(options.device)
    base = transformer(options).to(device, DTYPES[options.dtype])
    if options.checkpointing:
        base.enable_gradient_checkpointing()
    step = Step(options, device)
    print(
        f"largest gradient difference with checkpointing, relative: {checkpointing_error(base, step):.2e}\n"
    )
    adapted, adapter = with_tlora(twin(base), options.rank)
    contenders: dict[str, Callable[[], None]] = {
        "frozen": lambda: step.run(base.train(), asks_for_input=True),
        f"T-LoRA rank {options.rank}, timestep 500": trained(adapted, adapter, step, timesteps=[500]),
        f"PEFT LoRA rank {options.rank}": with_peft(twin(base), options.rank, step),
    }
    case = f"{options.double} + {options.single} blocks, {options.edge**2} + {step.text_tokens} tokens"
    report(side_by_side("B2", case, contenders, turns=options.turns, device=device), options)
    if device.type == "cuda":
        print(f"\npeak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, all contenders together")


def parse() -> argparse.Namespace:
    """The options of every bench, and those of this one."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--double", type=int, default=1, help="double blocks; Flux.1 has 19")
    own.add_argument("--single", type=int, default=1, help="single blocks; Flux.1 has 38")
    own.add_argument("--edge", type=int, default=16, help="image tokens along an edge; 64 is 1024 px")
    own.add_argument("--rank", type=int, default=64)
    own.add_argument("--dtype", choices=DTYPES, default="fp32")
    own.add_argument("--checkpointing", action="store_true")
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    options = arguments(__doc__)
    vars(options).update(vars(mine))
    if options.quick:
        options.edge, options.rank = 4, 4
    return options


def transformer(options: argparse.Namespace) -> nn.Module:
    """Flux.1's blocks at their real width (a small one with --quick), with random weights."""
    torch.manual_seed(0)
    width = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    model = FluxTransformer2DModel(
        num_layers=options.double,
        num_single_layers=options.single,
        guidance_embeds=True,
        **(width if options.quick else {}),
    )
    return model.requires_grad_(False)


def twin(base: nn.Module) -> nn.Module:
    """A model of its own modules and hooks, with the very weights of another."""
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


class Step:
    """The inputs of a step, alike for every contender."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.text_tokens = 16 if options.quick else TEXT_TOKENS
        self.device, self.dtype = device, DTYPES[options.dtype]
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        self.inputs: dict[str, Any] = {
            "hidden_states": draw(1, options.edge**2, 64),
            "encoder_hidden_states": draw(1, self.text_tokens, 4096),
            "pooled_projections": draw(1, 768),
            "guidance": torch.ones(1, device=device),
            "txt_ids": torch.zeros(self.text_tokens, 3, device=device),
            "img_ids": image_ids(options.edge, options.edge, device=device),
        }
        self.target = draw(1, options.edge**2, 64).float()

    def run(self, model: nn.Module, *, asks_for_input: bool = False) -> None:
        """Forward and backward."""
        inputs = dict(self.inputs, timestep=timestep_input([0.5], dtype=self.dtype).to(self.device))
        inputs["hidden_states"] = inputs["hidden_states"].detach().requires_grad_(asks_for_input)
        prediction = model(**inputs, return_dict=False)[0]
        (prediction.float() - self.target).square().mean().backward()


def with_tlora(model: nn.Module, rank: int) -> tuple[nn.Module, LycorisAdapter]:
    """The model in training mode with a T-LoRA on attention and feed-forward, slightly off its start."""
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": rank, "linear_alpha": float(rank)}
    config = LycorisConfig.model_validate({**values, "apply_preset": PRESET, "raw": values})
    adapter = LycorisAdapter.create(model.train(), config, spec=SPEC, seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 1e-2).to(parameter.device))
    return model, adapter


def checkpointing_error(base: nn.Module, step: Step) -> float:
    """Largest difference of any gradient with checkpointing from that without, over the largest gradient."""
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model, adapter = with_tlora(twin(base), 8)
        model.disable_gradient_checkpointing()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with adapter.rank_mask_for([700]):
            step.run(model)
        found.append([parameter.grad for parameter in adapter.parameters()])
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True)) / largest


def trained(
    model: nn.Module, adapter: LycorisAdapter, step: Step, *, timesteps: Sequence[int]
) -> Callable[[], None]:
    """A whole step of a T-LoRA, as the trainer takes it."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=LEARNING_RATE, fused=True)

    def run() -> None:
        with adapter.rank_mask_for(timesteps):
            step.run(model)
        optimizer.step()
        optimizer.zero_grad()

    return run


def with_peft(model: Any, rank: int, step: Step) -> Callable[[], None]:
    """A whole step of a PEFT LoRA on the same layers."""
    names = r"to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out"
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf".*transformer_blocks\..*({names})")
    model.train().add_adapter(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)

    def run() -> None:
        step.run(model)
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main()
