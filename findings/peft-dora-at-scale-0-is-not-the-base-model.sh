#!/usr/bin/env bash
# PEFT 0.21.2: a trained DoRA adapter with scale 0 still changes the model.
#
# The scale of a DoRA layer multiplies its low-rank update alone. The trained magnitudes go on rescaling the rows of the
# weight, so `set_scale(name, 0)`, which weights of 0 in diffusers' set_adapters come down to, does not give the base
# model back. Images "at strength 0" that serve as the base model's, and a teacher for prior preservation, are wrong
# without a word. LoRA with scale 0 is the base model.
# Instead: disable_adapter() of PEFT, disable_lora() of diffusers.
#
# Seen: "LoRA: trained 1.68, scale 0 0.00, disabled 0.00" and "DoRA: trained 1.82, scale 0 0.34, disabled 0.00", the largest
# differences from the base model's output. Exits with 1 when the zeros or the DoRA's difference change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "peft==0.21.2" "torch==2.13.0" "numpy<3"
cat > "$folder/dora.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

lines = []
for use_dora in (False, True):
    torch.manual_seed(0)
    base, inputs = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.randn(4, 8)
    expected = base(inputs).detach()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=use_dora))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = {"trained": model(inputs)}
        model.base_model.model[0].set_scale("default", 0.0)
        found["scale 0"] = model(inputs)
        with model.disable_adapter():
            found["disabled"] = model(inputs)
    changes = {name: float((output - expected).abs().max()) for name, output in found.items()}
    kind = "DoRA" if use_dora else "LoRA"
    print(kind + ":", ", ".join(f"{name} {change:.2f}" for name, change in changes.items()))
    assert changes["trained"] > 0.5
    assert changes["disabled"] < 1e-6
    assert (changes["scale 0"] > 0.1) == use_dora
PYTHON
"$folder/venv/bin/python" "$folder/dora.py"
