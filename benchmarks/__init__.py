"""Measurements of the product, each a ratio of two things that ran side by side: `python -m benchmarks.<name>`."""
