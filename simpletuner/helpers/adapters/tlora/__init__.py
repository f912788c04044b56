"""The T-LoRA layer: its delta, its rank mask, its initialisation."""
