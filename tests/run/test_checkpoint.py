"""Checkpoints: the format of earlier versions, and that saving and loading lose nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from craft_ray.config import CraftConfig
from craft_ray.errors import CacheRefused
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import GradientPair
from craft_ray.run.checkpoint import TrainingState, load_training_state

CPU = torch.device("cpu")


def written(folder: Path) -> tuple[Path, dict]:
    """A training state in the format of all checkpoints so far, written out."""
    optimizer = AdamW(nn.Linear(2, 1).parameters())
    dual = {name: torch.tensor(value).double() for name, value in
            (("multiplier", 0.5), ("integral", 0.25), ("moment", 2.0), ("weight", 0.125))}  # fmt: skip
    state = {
        "step": 7, "optimizer": optimizer.state_dict(), "dual": dual, "reached": [True, False], "cache": "abc",
    }  # fmt: skip
    (folder / "training_state").mkdir(parents=True)
    torch.save(state, folder / "training_state" / "state.pt")
    return folder, state


def test_earlier_checkpoints_load_and_are_written_the_same(tmp_path: Path) -> None:
    folder, state = written(tmp_path / "step_000007")
    loaded = load_training_state(folder, CPU)
    assert (loaded.step, loaded.reached, loaded.cache) == (7, [True, False], "abc")
    assert loaded.dual is not None
    assert loaded.dual.state_dict() == state["dual"]
    torch.save(loaded.state_dict(), tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(again) == list(state) == [field.name for field in fields(TrainingState)]
    assert again == state


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_is_restored_to_where_it_was_captured(enabled: bool) -> None:
    def parts() -> tuple[AdamW, GradientPair]:
        torch.manual_seed(0)
        module = nn.Linear(2, 1)
        gradients = GradientPair(module.named_parameters(), with_retention=enabled)
        return AdamW(gradients.parameters, lr=0.1), gradients

    optimizer, gradients = parts()
    for parameter in gradients.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gradients.restore_reached([True, False])
    dual = DualState.start(CraftConfig(), "cpu") if enabled else None
    cache = "abc" if enabled else None
    state = TrainingState.capture(3, optimizer, gradients, dual, cache)
    state = TrainingState.from_state_dict(state.state_dict(), CPU)

    other, others = parts()
    with pytest.raises(CacheRefused, match="holds another: resume with the cache it began with"):
        state.restore(other, others, "another")
    state.restore(other, others, cache)
    assert others.reached == [True, False]
    assert other.state_dict()["state"] == optimizer.state_dict()["state"]
    assert (state.step, state.dual) == (3, dual)
    for pair in (gradients, others):
        pair.close()
