"""Text to JSON values, with every problem noted at its place."""
