"""Image generation: validation images, the images of another run's adapter, the sample command."""
