"""The diagonal of the Fisher information matrix, from answers that the model itself has drawn.

    F_i = sum_n (d log p(y_n | x_n) / d theta_i)^2 / sum_n T_n,        y_n ~ p(. | x_n) of T_n terms

Terms drawn one after the other have uncorrelated scores of mean zero, so the expected square of a sample's score is the
sum over its terms, and F is the Fisher information of one term. To second order the divergence of theta from theta_0 is
1/2 (theta - theta_0)^T F (theta - theta_0) a term (S. Amari, Natural gradient works efficiently in learning, 1998).
Labels of the data in place of drawn answers would give the "empirical Fisher", which is another matrix
(Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def diagonal_fisher(parameters: Sequence[Tensor], samples: Iterable[tuple[Tensor, int]]) -> list[Tensor]:
    """The diagonal at the current `parameters`, in their shapes, in float32. It leaves no gradient behind.

    Args:
        samples: for each input log p(y | x), differentiable in the parameters, and its number of terms.
    """
    total = 0
    fisher = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for log_likelihood, terms in samples:
        scores = torch.autograd.grad(log_likelihood, parameters, allow_unused=True)
        for diagonal, score in zip(fisher, scores, strict=True):
            if score is not None:
                diagonal.add_(score.float().square())
        total += terms
    assert total > 0, "no sample"
    return [diagonal / total for diagonal in fisher]
