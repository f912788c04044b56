"""Atomic writes, the output folder, optional imports, logs."""
