"""What is known about a retention mode before anything is computed: what the teacher stores for it, and its units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stored = Literal["vectors", "suffix"]
"""`vectors`: hidden states at the anchored layers and positions. `suffix`: the tokens after the prompt."""


@dataclass(frozen=True)
class Unit:
    """The unit of a retention loss, and therefore of its budget epsilon."""

    name: str
    words: str
    default_budget: float | None = None
    """None: no number fits every teacher, so a config has to specify one."""


@dataclass(frozen=True)
class ModeFacts:
    """The facts about one retention mode."""

    stores: frozenset[Stored]
    units: Mapping[str, Unit]
    """By `craft.loss_type`, or under the single key "" where the mode has one loss."""

    def unit(self, loss_type: str) -> Unit:
        return self.units.get("") or self.units[loss_type]


RETENTION_MODES: dict[str, ModeFacts] = {
    "hidden": ModeFacts(
        stores=frozenset({"vectors"}),
        units={
            "relative_mse": Unit("relative_mse", "of the teacher's mean square", 0.05),
            "mse": Unit("mse", "mean square of the hidden states"),
            "cosine": Unit("cosine", "1 - cosine"),
            "l1": Unit("l1", "mean absolute difference of the hidden states"),
        },
    ),
    # The teacher's own uncertainty is part of this loss, and differs from teacher to teacher.
    "token_ce": ModeFacts(stores=frozenset({"suffix"}), units={"": Unit("nats", "nats a token")}),
}
