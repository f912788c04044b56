#!/usr/bin/env bash
# diffusers 0.42.0: of a kohya-named SDXL LoRA whose attention layers have different alphas, the most frequent alpha is
# applied to all of them. The others' entries are passed to PEFT under names that match no layer, and PEFT warns that
# it ignores them; nothing fails. A LoRA with per-layer alphas (or ranks with one alpha) is then applied at another
# strength than its trainer's.
# Instead: write one alpha to every layer and put the rest into lora_up.
#
# Seen: file {'to_q': 0.25, 'to_k': 1.0, 'to_v': 1.0}, applied {'to_q': 1.0, 'to_k': 1.0, 'to_v': 1.0}.
# Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.0 peft==0.21.0 transformers==5.23.0 "accelerate>=1.15,<2"
"$folder/venv/bin/python" - <<'PYTHON'
import diffusers, peft, torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1),
)
attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
alphas, state = {"to_q": 1.0, "to_k": 4.0, "to_v": 4.0}, {}
for name, alpha in alphas.items():
    key = "lora_unet_" + f"{attention}.{name}".replace(".", "_")
    state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = torch.randn(4, 64), torch.randn(64, 4)
    state[f"{key}.alpha"] = torch.tensor(alpha)
converted, network_alphas, *_ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
StableDiffusionXLPipeline.load_lora_into_unet(converted, network_alphas, unet)
layers = dict(unet.named_modules())
stated = {name: alpha / 4 for name, alpha in alphas.items()}
applied = {name: float(layers[f"{attention}.{name}"].scaling["default_0"]) for name in alphas}
print(f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}")
print(f"alpha / rank of the file: {stated}\napplied: {applied}")
raise SystemExit(0 if applied == dict.fromkeys(alphas, 1.0) else 1)
PYTHON
