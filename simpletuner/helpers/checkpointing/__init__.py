"""Checkpoints: the state of a run, saved, found and compared; and signals that stop a run."""
