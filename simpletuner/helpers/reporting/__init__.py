"""Metrics, trackers, progress bar, run summary and HTML report of a run."""
