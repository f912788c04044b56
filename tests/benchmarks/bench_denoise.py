"""B6: one denoising step with the schedule against the base model, on a block stack of SDXL's widths.

python tests/benchmarks/bench_denoise.py [--quick]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import arguments, report, side_by_side
from models import sdxl_stack

from simpletuner.helpers.adapters.network import LycorisAdapter
from simpletuner.helpers.adapters.tlora import mask
from simpletuner.helpers.configuration.schema.lycoris import LycorisConfig
from simpletuner.helpers.models.sdxl.spec import SPEC

STEPS = 28
RANK = 64


def main() -> None:
    """Time the denoiser call of a step, timesteps going round the 28 of a picture."""
    options = arguments(__doc__)
    options.turns = STEPS if not options.quick else 2
    edge = 8 if options.quick else 32
    base = sdxl_stack(widths=(64, 128)) if options.quick else sdxl_stack()
    inputs = (torch.randn(2, 4, edge, edge), torch.tensor(500), torch.randn(2, 77, 2048))
    conditions = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.ones(2, 6)}

    def denoise(model: nn.Module) -> None:
        with torch.no_grad():
            model(*inputs, added_cond_kwargs=conditions)

    def peft() -> Callable[[], None]:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        model = inject_adapter_in_model(config, copy.deepcopy(base)).eval()
        return lambda: denoise(model)

    contenders = {"base": lambda: denoise(base), "T-LoRA": ours(copy.deepcopy(base), denoise), "PEFT": peft()}
    contenders[f"PEFT LoRA rank {RANK}, unfused"] = contenders.pop("PEFT")
    case = f"{edge}x{edge} latents, batch 2 (guidance)"
    report(side_by_side("B6", case, contenders, turns=options.turns, device=torch.device("cpu")), options)


def ours(model: nn.Module, denoise: Callable[[nn.Module], None]) -> Callable[[], None]:
    """A denoising step that opens the ranks of its timestep, as the pipelines do."""
    values = {"algo": "tlora", "multiplier": 1.0, "linear_dim": RANK, "linear_alpha": RANK}
    config = LycorisConfig.model_validate(values | {"apply_preset": {"target_module": ["Attention"]}})
    adapter = LycorisAdapter.create(model, config, spec=SPEC, seed=0)
    timesteps = cycle(range(999, 0, -1000 // STEPS))
    schedule = adapter.schedule
    assert schedule is not None

    def run() -> None:
        mask.set_mask(schedule, [next(timesteps)], group=adapter.group)
        denoise(model)
        mask.clear_mask(adapter.group)

    return run


if __name__ == "__main__":
    main()
