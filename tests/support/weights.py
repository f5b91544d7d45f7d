"""Weights of tiny models in tests."""

from __future__ import annotations

import torch
from torch import nn


def spread(module: nn.Module) -> None:
    """Give every matrix fresh weights of 0.12, the same in every order of tests. Those of 0.02, which libraries draw,
    attend nearly uniformly and repeat one token, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.12, generator=generator)
