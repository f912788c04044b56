"""SimpleTuner-T: diffusion fine-tuning around timestep-dependent LoRA."""

__version__ = "0.1.0"
