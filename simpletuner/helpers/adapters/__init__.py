"""Adapters of the denoiser: T-LoRA, LyCORIS and PEFT."""
