"""Every subsystem of the trainer, in layers; a module imports its own folder and lower layers."""
