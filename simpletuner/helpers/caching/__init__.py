"""Content-addressed tensors on disk."""
