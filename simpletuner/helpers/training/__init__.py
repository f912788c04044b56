"""The training loop and what it wires together."""
