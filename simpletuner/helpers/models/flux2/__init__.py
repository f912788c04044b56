"""Flux.2: dev, Klein base and distilled Klein."""
