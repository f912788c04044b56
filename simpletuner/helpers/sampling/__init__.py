"""Images made with a model: validation images, comparisons, the sample command."""
