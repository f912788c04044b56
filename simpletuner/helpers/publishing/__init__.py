"""The model card of a run, and its upload to the Hugging Face hub."""
