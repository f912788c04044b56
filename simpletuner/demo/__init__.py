"""The embedded demo: a small SDXL model, its training code, and two tiny datasets."""
