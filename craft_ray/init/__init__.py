"""`craft-ray init`: a first config, from a look at the model and at the data."""

from typing import Literal

Preset = Literal["full", "lora", "robot"]
"""What is trained: all weights of a model, an adapter, or all weights of a policy."""
