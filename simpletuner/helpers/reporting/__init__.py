"""What a run says of itself: metrics, trackers, progress bar, run summary, HTML report."""
