"""B25: a compiled block of real width: T-LoRA and PEFT, eager and compiled by inductor, forward and backward.

    python tests/benchmarks/bench_compile.py [--block "Flux.1 single"] [--quick]

Contenders share the frozen weights. Before the timing, the gradients of the compiled T-LoRA are compared with
the eager ones at several timesteps, and the first compiled step is timed.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from blocks import KINDS, Shape
from measure import Result, arguments, report, side_by_side

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.configuration.schema.compiling import CompileConfig
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.compiling import compile_for_training

CASES = {
    "SDXL transformer": (Shape(1, 16, 77, 1280), 64),
    "Flux.1 single": (Shape(1, 8, 192, 3072, head=128), 64),
}
QUICK = {"SDXL transformer": (Shape(1, 4, 8, 64, context=64), 4)}
WHOLE_BLOCK = {"dynamo_use_regional_compilation": False}


def main() -> None:
    """Bench every case; --quick compiles without a C++ compiler."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--block", choices=CASES, nargs="*", default=[*CASES], help="these alone")
    mine, sys.argv[1:] = own.parse_known_args()
    options = arguments(__doc__)
    cases = QUICK if options.quick else {block: CASES[block] for block in mine.block}
    backend = "aot_eager" if options.quick else "inductor"
    config = CompileConfig(dynamo_backend=backend, **WHOLE_BLOCK)
    results: list[Result] = []
    for kind, (shape, rank) in cases.items():
        bench = Bench(kind, shape, rank=rank, device=torch.device(options.device))
        print(f"{kind}: {bench.compiled_error(config)}")
        results += bench.run(config, turns=options.turns)
    report(results, options)


class Bench:
    """One block and its inputs, alike for every contender."""

    def __init__(self, kind: str, shape: Shape, *, rank: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.kind, self.shape, self.rank, self.device = kind, KINDS[kind], shape, rank, device
        with device:
            self.base = self.kind.module(shape).requires_grad_(False).train()
            self.inputs = self.kind.inputs(shape)
        self.targets = [layer.name for layer in self.kind.block(shape).layers if layer.is_target]

    def step(self, block: nn.Module) -> None:
        """Forward and backward, with the gradient of what the block before made."""
        inputs = dict(self.inputs)
        for name in self.kind.streams:
            if inputs.get(name) is not None:
                inputs[name] = inputs[name].detach().requires_grad_()
        outputs = block(**inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else [each for each in outputs if each is not None]
        sum(each.square().mean() for each in outputs).backward()

    def twin(self) -> nn.Module:
        """A block of its own modules with the very weights of the others."""
        return copy.deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})

    def tlora(self, config: CompileConfig | None = None) -> tuple[nn.Module, LycorisAdapter]:
        """A block with a T-LoRA off its start, compiled if a configuration is given."""
        block = self.twin()
        names = [rf".*\.{re.escape(name)}$" for name in self.targets]
        values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": self.rank, "linear_alpha": self.rank}
        preset = {"apply_preset": {"target_name": names}}
        adapter = LycorisAdapter.create(
            nn.ModuleDict({self.kind.path: nn.ModuleList([block])}),
            LycorisConfig.model_validate({**values, **preset, "raw": values}),
            spec=self.kind.spec,
            seed=0,
        )
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(self.device) * 1e-2)
        if config is not None:
            compile_for_training(block, config)
        return block, adapter

    def compiled_error(self, config: CompileConfig) -> str:
        """The largest gradient error over the largest gradient, at four timesteps, and the first step."""
        (plain, one), (compiled, other) = self.tlora(), self.tlora(config)
        worst, seconds = 0.0, []
        for timestep in (900, 500, 100, 0):
            for block, adapter in ((plain, one), (compiled, other)):
                began_s = time.perf_counter()
                with adapter.rank_mask_for([timestep]):
                    self.step(block)
                seconds.append(time.perf_counter() - began_s)
            found = [(a.grad, b.grad) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
            largest = max(float(a.abs().max()) for a, _ in found)
            worst = max(worst, *(float((a - b).abs().max()) / largest for a, b in found))
            for parameter in (*one.parameters(), *other.parameters()):
                parameter.grad = None
        return f"largest gradient error {worst:.1e}, first compiled step {seconds[1]:.1f} s"

    def run(self, config: CompileConfig, *, turns: int) -> list[Result]:
        """Time all contenders."""
        contenders: dict[str, Callable[[], None]] = {}
        for label, chosen in (("eager", None), ("compiled", config)):
            contenders[f"frozen, {label}"] = self.frozen(chosen)
            for timestep in (500, 0):
                contenders[f"T-LoRA rank {self.rank}, t = {timestep}, {label}"] = self.ours(chosen, timestep)
            for rank in (self.rank, 2 * self.rank):
                contenders[f"PEFT LoRA rank {rank}, {label}"] = self.peft(chosen, rank)
        case = f"{self.name}, width {self.shape.width}, {self.shape.image} + {self.shape.text} tokens"
        return side_by_side("B25", case, contenders, turns=turns, device=self.device)

    def frozen(self, config: CompileConfig | None) -> Callable[[], None]:
        """A step of the block without an adapter."""
        block = self.twin()
        if config is not None:
            compile_for_training(block, config)
        return lambda: self.step(block)

    def ours(self, config: CompileConfig | None, timestep: int) -> Callable[[], None]:
        """A masked step; gradients are freed after it."""
        block, adapter = self.tlora(config)

        def run() -> None:
            with adapter.rank_mask_for([timestep]):
                self.step(block)
            for parameter in adapter.parameters():
                parameter.grad = None

        return run

    def peft(self, config: CompileConfig | None, rank: int) -> Callable[[], None]:
        """A step of PEFT's LoRA on the same layers."""
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=self.targets)
        block = inject_adapter_in_model(lora, self.twin())
        if config is not None:
            compile_for_training(block, config)

        def run() -> None:
            self.step(block)
            for parameter in block.parameters():
                parameter.grad = None

        return run


if __name__ == "__main__":
    main()
