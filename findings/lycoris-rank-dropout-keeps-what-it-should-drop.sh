#!/usr/bin/env bash
# lycoris-lora 4.1.3: rank_dropout 0.1 drops a tenth of a LoCon layer's ranks, but nine tenths of a norm layer's
# elements (train_norm) and of GLoRA's ranks in bypass mode; without bypass mode GLoRA drops none.
#
# LoCon keeps an element where a uniform number lies above rank_dropout, the two others where it lies below. So a
# small rate leaves norms and GLoRA almost untrained, and no message says so.
# Instead: no rank_dropout with train_norm or glora, or 1 - rate in a network that has only these.
#
# Seen: "share of the effect that is left at rank_dropout 0.1: LoCon 0.90, norm 0.10, GLoRA 1.00, GLoRA in bypass mode
# 0.10". Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.norms import NormModule
from torch import nn

torch.manual_seed(0)
inputs = torch.randn(4, 64)

def share_left(kind, layer, *ranks, **options):
    """Mean effect in training as a share of the effect in evaluation."""
    module = kind("layer", layer, 1.0, *ranks, rank_dropout=0.1, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.apply_to()
    with torch.no_grad():
        module.eval()
        module.multiplier = 0.0
        without = layer(inputs).clone()
        module.multiplier = 1.0
        full = layer(inputs) - without
        module.train()
        seen = sum(layer(inputs) - without for _ in range(400)) / 400
    return float((seen * full).sum() / full.square().sum())

shares = {
    "LoCon": share_left(LoConModule, nn.Linear(64, 64), 32, 32),
    "norm": share_left(NormModule, nn.LayerNorm(64)),
    "GLoRA": share_left(GLoRAModule, nn.Linear(64, 64), 32, 32),
    "GLoRA in bypass mode": share_left(GLoRAModule, nn.Linear(64, 64), 32, 32, bypass_mode=True),
}
print(f"lycoris-lora {version('lycoris-lora')}, torch {torch.__version__}")
print("share of the effect that is left at rank_dropout 0.1:", ", ".join(f"{k} {v:.2f}" for k, v in shares.items()))
expected = (0.9, 0.1, 1.0, 0.1)
raise SystemExit(0 if all(abs(v - e) < 0.02 for v, e in zip(shares.values(), expected)) else 1)
PYTHON
