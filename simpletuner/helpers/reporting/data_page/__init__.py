"""The page of `simpletuner data look`: images and captions as they are trained, and what is wrong there."""
