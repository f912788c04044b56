"""Flux.1: a rectified-flow transformer with double and single blocks, by Black Forest Labs."""
