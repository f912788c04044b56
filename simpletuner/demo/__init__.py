"""The embedded demo: a toy model and a photograph, and what made them."""
