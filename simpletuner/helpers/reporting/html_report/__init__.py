"""The page that shows a run: one file of its own, made from what lies in the run's folder."""
