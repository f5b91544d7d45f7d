"""CRaFT: constrained retention fine-tuning. The method, its models, its anchor cache; knows nothing of Ray."""

__version__ = "0.1.0"
