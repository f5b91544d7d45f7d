"""Where samples come from, and their order."""
