"""An adapter in a model, and its folder in PEFT's form."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's files."""
BASE = "base_model.json"
"""Ours: the hash of the weights that the adapter was trained on."""
NAME = "default"
PREFIX = "base_model.model."
"""What PEFT puts before the name of each weight in a file."""


@dataclass(frozen=True)
class Adapter:
    """An adapter in a model."""

    tuner: Any
    """PEFT's `LoraModel`."""
    base: str
    """Hash of the weights without it: the teacher's."""
    trained: frozenset[str]
    """The weights that full training would change."""

    @property
    def config(self) -> Any:
        """PEFT's `LoraConfig`."""
        return self.tuner.peft_config[NAME]

    def save(self, folder: Path) -> None:
        """Write the adapter as a folder that PEFT and transformers load."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {PREFIX + name: tensor.contiguous() for name, tensor in adapter_state(self.tuner.model).items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config = copy.copy(self.config)
        config.inference_mode = True
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))
        (folder / BASE).write_text(json.dumps({"weights": self.base}))


def adapter_state(module: nn.Module) -> dict[str, Any]:
    """The weights of a module's adapter, by their names in it."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub whether the vocabulary was resized.
    state: dict[str, Any] = get_peft_model_state_dict(module, adapter_name=NAME, save_embedding_layers=False)
    return state
