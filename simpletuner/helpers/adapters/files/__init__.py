"""Adapter files: our own, those of other trainers, and exports."""
