"""The Fisher information's diagonal against models whose Fisher information is known."""

from __future__ import annotations

import pytest
import torch

from craft_ray.method.fisher import diagonal_fisher


def test_a_linear_gaussian_model_has_the_fisher_information_of_its_inputs() -> None:
    """y ~ N(w x, s^2) has F_ii = E[x_i^2] / s^2, and the answers w x +- s have it exactly: their scores are +-x / s."""
    torch.manual_seed(0)
    inputs, spread = torch.randn(40, 3), 0.7
    w, unused = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)

    def samples():
        for x in inputs:
            for noise in (spread, -spread):
                y = (w @ x).detach() + noise
                yield -((y - w @ x) ** 2) / (2 * spread**2), 1

    expected = inputs.square().mean(0) / spread**2
    found, none = diagonal_fisher([w, unused], samples())
    torch.testing.assert_close(found, expected)
    assert not none.any(), "a weight that no answer depends on has none"
    assert w.grad is None


def test_it_is_the_information_of_one_term() -> None:
    """A Bernoulli logit z: F = p (1 - p) for each of the tosses of a sample."""
    torch.manual_seed(1)
    z = torch.tensor(0.8, requires_grad=True)
    p = torch.sigmoid(z).item()

    def samples():
        for _ in range(3000):
            tosses = (torch.rand(4) < p).float()
            yield (tosses * z - torch.nn.functional.softplus(z)).sum(), 4

    [found] = diagonal_fisher([z], samples())
    assert float(found) == pytest.approx(p * (1 - p), rel=0.05)
