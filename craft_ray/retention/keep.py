"""The budget epsilon that keeps a stated part of a skill's score.

Constrained optimisation with a proxy (Cotter et al., arXiv 1804.06500): what the user bounds, the skill's score, has
no gradient; L_ret has one, and is the proxy. The inner loop holds L_ret at epsilon. After each validation, epsilon
moves to where the measured skill would be on its target, if what is lost of it were proportional to L_ret:

    epsilon <- L_0 + (L - L_0) (1 - keep) / (1 - kept),    the factor bounded to [1/2, 2]

and lambda is divided by the factor: between two validations it moves only by its rate, and would arrive too late.

L is the mean of L_ret that the multiplier follows, L_0 that of the teacher (its own uncertainty, for a loss of tokens),
and `kept` a lower confidence bound of the skill's score over the teacher's. Neither need the proportion hold, nor need
L on training anchors be what it is on others: both are taken again from each validation.
"""

from __future__ import annotations

from typing import Any

MOST = 2.0
"""Bound of the change between two validations: one of them can be wrong."""


class KeptShare:
    """The target of one skill, and the budget that follows it.

    Args:
        keep: part of the teacher's score that must be kept.
        epsilon: the first budget.
    """

    def __init__(self, keep: float, epsilon: float) -> None:
        self.keep = keep
        self.epsilon = epsilon
        self._untouched: float | None = None

    def start(self, untouched: float) -> None:
        """Note L_0, the loss of the untouched student."""
        self._untouched = untouched

    def observe(self, loss: float, kept: float) -> float:
        """Move the budget after a validation.

        Args:
            loss: the mean of L_ret in training.
            kept: lower bound of the skill's score, as a part of the teacher's.

        Returns:
            The factor by which the loss may rise, or has to fall.
        """
        assert self._untouched is not None
        lost = max(1.0 - kept, 1e-9)
        factor = min(max((1.0 - self.keep) / lost, 1 / MOST), MOST)
        moved = max(loss - self._untouched, 0.0)
        if moved > 0:
            self.epsilon = self._untouched + moved * factor
        return factor

    def state_dict(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "untouched": self._untouched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epsilon, self._untouched = state["epsilon"], state["untouched"]
