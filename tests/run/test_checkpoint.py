"""Checkpoints: the format of earlier versions, and that saving and loading lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from craft_ray.run.checkpoint import load_training_state


@pytest.mark.parametrize("held", [True, False])
def test_earlier_checkpoints_load(held: bool, tmp_path: Path) -> None:
    """They had one multiplier, or none."""
    numbers = {"multiplier": 0.5, "integral": 0.25, "moment": 2.0, "weight": 0.125}
    dual = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} if held else None
    cache = "abc" if held else None
    state: dict[str, Any] = {
        "step": 7, "optimizer": AdamW(nn.Linear(2, 1).parameters()).state_dict(), "dual": dual,
        "reached": [True, False], "cache": cache,
    }  # fmt: skip
    (tmp_path / "training_state").mkdir()
    torch.save(state, tmp_path / "training_state" / "state.pt")
    loaded = load_training_state(tmp_path)
    assert (loaded.step, loaded.optimizer, loaded.reached) == (7, state["optimizer"], [True, False])
    assert loaded.constraints == ([{"dual": dual, "cache": cache}] if held else [])
