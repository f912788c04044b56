#!/usr/bin/env bash
# lycoris-lora 4.1.3: a network made with create_lycoris_from_weights(0.5, ...) is merged by merge_to() at strength 1.
#
# The first argument is the network's multiplier, and a network that is applied (apply_to) has it. merge_to has an
# argument of its own, 1.0 by default, and does not multiply the two. The recipe of these two lines stands in many
# model cards: a strength below 1 written there has no effect.
# Instead: merge_to(0.5).
#
# Seen: "asked for 0.5: applied 0.500, merged 1.000". Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from lycoris import create_lycoris_from_weights
from torch import nn

torch.manual_seed(0)
down, up = torch.randn(2, 8), torch.randn(8, 2)
file = {"lycoris_0.lora_down.weight": down, "lycoris_0.lora_up.weight": up, "lycoris_0.alpha": torch.tensor(2.0)}

def strength(attach):
    """Share of the file's delta in the layer's effect."""
    model, eye = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.eye(8)
    with torch.no_grad():
        before = model(eye).clone()
        network, _ = create_lycoris_from_weights(0.5, "", model, weights_sd=dict(file))
        attach(network)
        delta = (model(eye) - before).T
    return float((delta * (up @ down)).sum() / (up @ down).square().sum())

applied, merged = strength(lambda network: network.apply_to()), strength(lambda network: network.merge_to())
print(f"lycoris-lora {version('lycoris-lora')}, torch {torch.__version__}")
print(f"asked for 0.5: applied {applied:.3f}, merged {merged:.3f}")
raise SystemExit(0 if (round(applied, 3), round(merged, 3)) == (0.5, 1.0) else 1)
PYTHON
