"""Benchmark of LoRA, Ortho-LoRA and T-LoRA on the embedded model, measured in closed form."""
