"""B24: a training step of a T-LoRA against one of a PEFT LoRA on the same layers of the embedded SDXL.

    python tests/benchmarks/bench_tlora_step.py [--quick] [--rank 16] [--pairs 40]

Its layers are 48 to 512 wide, so that the host's work counts and not the arithmetic, as for SDXL on a fast
GPU. A step is forward, backward, clipping, fused AdamW and zero_grad. The contenders take turns in blocks of
steps; a ratio is the median over the pairs of blocks, with its 95 % bootstrap interval. The operator
calls are those that torch's profiler counts beyond the frozen model's, for each adapted layer and step.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, machine, paired

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.sdxl.embedded import make_embedded
from simpletuner.helpers.models.sdxl.spec import SPEC

TIMESTEP = 500


def main() -> None:
    """Time steps without and with gradient checkpointing, and count calls."""
    options = parse()
    base = make_embedded(["a", "cat"], seed=0).unet.requires_grad_(False).train()
    paths = adapted_paths(base)
    print(
        f"{machine()}; {len(paths)} layers, rank {options.rank}, {options.pairs} pairs of blocks of ", end=""
    )
    print(f"{options.steps} steps; CPU time\n")
    print("| case | ratio to PEFT | 95 % interval | T-LoRA ms | PEFT ms |\n|---|---|---|---|---|")
    for case, checkpointing, mixed in [
        ("one timestep", False, False),
        ("a timestep per sample", False, True),
        ("one timestep, gradient checkpointing", True, False),
    ]:
        ours, theirs = with_tlora(base, options.rank, mixed=mixed), with_peft(base, options.rank, paths)
        for step in (ours, theirs):
            if checkpointing:
                step.model.enable_gradient_checkpointing()
        found = paired(ours, theirs, pairs=options.pairs, steps=options.steps)
        interval = f"{found.low:.3f}-{found.high:.3f}"
        print(f"| {case} | {found.ratio:.3f} | {interval} | {found.first_ms:.3g} | {found.second_ms:.3g} |")
    print("\n| contender | operator calls per adapted layer and step |\n|---|---|")
    frozen = calls(Step(copy.deepcopy(base), []))
    for name, step in {
        "T-LoRA, one timestep": with_tlora(base, options.rank, mixed=False),
        "T-LoRA, a timestep per sample": with_tlora(base, options.rank, mixed=True),
        "PEFT": with_peft(base, options.rank, paths),
    }.items():
        print(f"| {name} | {(calls(step) - frozen) / len(paths):.1f} |")


def parse() -> argparse.Namespace:
    """The options of every bench, and those of this one."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--rank", type=int, default=16)
    own.add_argument("--pairs", type=int, default=40)
    own.add_argument("--steps", type=int, default=3, help="steps of a block")
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    options = arguments(__doc__)
    vars(options).update(vars(mine))
    if options.quick:
        options.pairs, options.steps = 2, 1
    return options


def adapted_paths(model: nn.Module) -> list[str]:
    """Names of the linear layers in attention and feed-forward."""
    parts = [
        path for path, part in model.named_modules() if type(part).__name__ in ("Attention", "FeedForward")
    ]
    return [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.Linear) and any(path.startswith(f"{each}.") for each in parts)
    ]


class Step:
    """A whole training step of one model; the input asks for a gradient where nothing is trained."""

    def __init__(self, model: Any, trained: list[nn.Parameter], *, adapter: Any = None, mixed: bool = False):
        self.model, self.trained, self.adapter = model, trained, adapter
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        self.timesteps = [TIMESTEP, TIMESTEP + 300 * mixed]
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.latents, self.target = draw(2, 4, 16, 16), draw(2, 4, 16, 16)
        self.text, self.pooled = draw(2, 32, 128), draw(2, 64)
        self.sizes = torch.full((2, 6), 64.0)

    def __call__(self) -> None:
        """Forward, backward, clipping, update."""
        if self.adapter is None:
            self._gradients()
        else:
            with self.adapter.rank_mask_for(self.timesteps):
                self._gradients()
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _gradients(self) -> None:
        added = {"text_embeds": self.pooled, "time_ids": self.sizes}
        latents = self.latents if self.trained else self.latents.clone().requires_grad_()
        prediction = self.model(
            latents, torch.tensor(self.timesteps), self.text, added_cond_kwargs=added, return_dict=False
        )[0]
        (prediction - self.target).square().mean().backward()


def with_tlora(base: nn.Module, rank: int, *, mixed: bool) -> Step:
    """A T-LoRA on attention and feed-forward, as a run makes it."""
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": rank, "linear_alpha": float(rank)}
    preset = {"target_module": ["Attention", "FeedForward"]}
    config = LycorisConfig.model_validate({**values, "apply_preset": preset, "raw": values})
    model = copy.deepcopy(base)
    adapter = LycorisAdapter.create(model, config, spec=SPEC, seed=0)
    return Step(model, adapter.parameters(), adapter=adapter, mixed=mixed)


def with_peft(base: nn.Module, rank: int, paths: list[str]) -> Step:
    """PEFT's LoRA on these layers."""
    model: Any = copy.deepcopy(base)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths))
    return Step(model, [weight for weight in model.parameters() if weight.requires_grad])


def calls(step: Callable[[], None]) -> int:
    """Calls of operators in one step."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(each.count for each in profile.key_averages() if each.key.startswith("aten::"))


if __name__ == "__main__":
    main()
