"""The optimiser with moments in 8 bits: as AdamW within its rounding, smaller, and resumed bit for bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from craft_ray.config import TrainConfig
from craft_ray.errors import ConfigError
from craft_ray.run.optimization import make_optimization


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))]


def opened(own: list[nn.Parameter], optimizer: str) -> Any:
    config = TrainConfig(steps=6, optimizer=optimizer, learning_rate=1e-2, schedule="linear")
    return make_optimization(None, own, config)  # type: ignore[arg-type]


def steps(own: list[nn.Parameter], optimization: Any, which: range) -> None:
    for step in which:
        optimization.set_rate(step)
        torch.manual_seed(step)
        for p in own:
            p.grad = torch.randn_like(p) + 1
        optimization.optimizer.step()


def state_bytes(optimizer: Optimizer) -> int:
    held = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return sum(sum(part.nbytes for part in (t.codes, t.scale)) if hasattr(t, "codes") else t.nbytes for t in held)


@pytest.mark.slow
def test_moments_in_8_bits_take_a_quarter_and_resume_bit_for_bit(tmp_path: Any) -> None:
    pytest.importorskip("torchao", reason="needs the extra 8bit")
    start = parameters()
    found = {}
    for name in ("adamw", "adamw_8bit"):
        own = parameters()
        optimization = opened(own, name)
        steps(own, optimization, range(3))
        found[name] = own, optimization
    (exact, plain), (rounded, small) = found["adamw"], found["adamw_8bit"]
    moved = (exact[0] - start[0]).norm()
    assert 0 < (rounded[0] - exact[0]).norm() < 0.1 * moved
    assert state_bytes(small.optimizer) < 0.3 * state_bytes(plain.optimizer)

    torch.save(small.state_dict(), tmp_path / "state.pt")
    again = [nn.Parameter(p.detach().clone()) for p in rounded]
    resumed = opened(again, "adamw_8bit")
    resumed.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    for own, optimization in ((rounded, small), (again, resumed)):
        steps(own, optimization, range(3, 6))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, rounded, strict=True))


def test_8_bits_without_their_package_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError) as caught:
        opened(parameters(), "adamw_8bit")
    message = caught.value.message
    assert message.startswith("train.optimizer is adamw_8bit, but torchao does not import")
    assert message.endswith("pip install 'craft-ray[8bit]'")
    assert "\n" not in message
