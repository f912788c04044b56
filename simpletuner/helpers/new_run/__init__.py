"""A new configuration from a few answers: presets by memory and purpose, and the files of a run."""
