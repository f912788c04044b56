#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU kernels): 8-bit Lion moves weights whose gradient has always been 0, by the whole rate.
#
# Lion steps by the sign of its momentum. The table of 8-bit values has a 0, yet beside larger values of its block of
# 256 a momentum of 0 is stored as the code of 2e-05 of the largest. Its sign moves the weight by the learning rate,
# like one that has a gradient. 32-bit Lion of the same package leaves such weights where they are; 8-bit AdamW moves
# them a little. An adapter with weights that rest at some steps (closed ranks, unused tokens) drifts.
# Instead: 32-bit Lion, or 8-bit AdamW.
#
# Seen: "without gradient moved by at most: Lion 0.0000, Lion8bit 0.0900, AdamW8bit 0.0004" after ten steps at rate
# 0.01. Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "bitsandbytes==0.50.2" "torch==2.13.0" "numpy<3"
cat > "$folder/lion.py" <<'PYTHON'
import bitsandbytes
import torch

gradient = torch.zeros(64, 256)
gradient[:, ::2] = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))  # every other column has none
moved = []
for name in ("Lion", "Lion8bit", "AdamW8bit"):
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = getattr(bitsandbytes.optim, name)([weight], lr=0.01, weight_decay=0.0)
    for _ in range(10):
        weight.grad = gradient.clone()
        optimizer.step()
    moved.append(f"{name} {weight.detach()[:, 1::2].abs().max():.4f}")
print("without gradient moved by at most:", ", ".join(moved))
PYTHON
seen=$("$folder/venv/bin/python" "$folder/lion.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "without gradient moved by at most: Lion 0.0000, Lion8bit 0.0900, AdamW8bit 0.0004" ]
