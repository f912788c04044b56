"""Memory, disk space and time of a run before it begins, counted from its configuration."""
