"""The page of `simpletuner compare`."""
