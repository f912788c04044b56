"""The sections of a configuration and the values in them."""
