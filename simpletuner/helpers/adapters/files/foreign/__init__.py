"""Adapter files of other programs, read into LyCORIS's key layout with this program's layer names."""
