"""The comparison of T-LoRA with its relatives on the embedded model, measured in closed form."""
