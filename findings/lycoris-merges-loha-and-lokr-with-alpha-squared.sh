#!/usr/bin/env bash
# lycoris-lora 4.1.3: merge_to() of a LoHa or LoKr layer multiplies by alpha / dim twice.
#
# The layer that is applied adds alpha / dim times its product, as a LoCon layer does; merged, it adds (alpha / dim)^2
# times. With alpha equal to dim, or LoKr's full matrices, nothing shows; with the usual alpha of half the dim a merged
# model has half of the effect that was trained.
# Instead: compute the merged weight from the layer's own forward, or keep alpha equal to dim.
#
# Seen: "merged, as a share of applied, at alpha / dim 0.5: LoCon 1.000, LoHa 0.500, LoKr 0.500". Exits with 1 when
# that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 lycoris-lora==4.1.3
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

torch.manual_seed(0)

def merged_share(kind, **options):
    """The merged delta as a share of the delta that the applied layer adds."""
    layer, eye = nn.Linear(64, 64, bias=False), torch.eye(64)
    module = kind("layer", layer, 1.0, 2, 1.0, **options)  # dim 2, alpha 1
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        before = layer(eye).clone()
        module.apply_to()
        applied = layer(eye) - before
        module.restore()
        module.merge_to(1.0)
        merged = layer(eye) - before
    return float((merged * applied).sum() / applied.square().sum())

shares = {
    "LoCon": merged_share(LoConModule),
    "LoHa": merged_share(LohaModule),
    "LoKr": merged_share(LokrModule, factor=4),
}
print(f"lycoris-lora {version('lycoris-lora')}, torch {torch.__version__}")
print("merged, as a share of applied, at alpha / dim 0.5:", ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))
raise SystemExit(0 if [round(v, 3) for v in shares.values()] == [1.0, 0.5, 0.5] else 1)
PYTHON
