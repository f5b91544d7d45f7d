"""CRaFT: constrained retention fine-tuning. The method, its models, its anchor cache; nothing here depends on Ray."""

__version__ = "0.1.0"
