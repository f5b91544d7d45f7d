"""What is known about a retention mode before anything is computed: what the teacher stores for it, and its units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

Stored = Literal["vectors", "suffix", "logits", "response"]
"""`vectors`: hidden states at the anchored layers and positions. `suffix`: the tokens after the prompt. `logits`: the
most likely next tokens and their log-probabilities, as `anchors.logits` says. `response`: the data's own responses, as
tokens."""


@dataclass(frozen=True)
class Unit:
    """The unit of a retention loss, and therefore of its budget epsilon."""

    name: str
    words: str
    default_budget: float | None = None
    """None: no number fits every teacher, so a config has to specify one."""


OldData = Literal["none", "unlabelled", "labelled"]
"""What training needs of the old skill: nothing, only inputs, or inputs with their right responses."""


@dataclass(frozen=True)
class ModeFacts:
    """The facts about one retention mode."""

    implementation: str
    """Module and class; it needs torch, so it is imported only where it is used."""
    stores: frozenset[Stored]
    units: Mapping[str, Unit]
    """By `craft.loss_type`, or under the single key "" if the mode has one loss."""
    old_data: OldData = "unlabelled"
    distance_of_weights: bool = False
    """Whether the loss is one of the weights, for which no data are held out."""

    def unit(self, loss_type: str) -> Unit:
        return self.units.get("") or self.units[loss_type]


RETENTION_MODES: dict[str, ModeFacts] = {
    "hidden": ModeFacts(
        "craft_ray.retention.hidden:Hidden",
        stores=frozenset({"vectors"}),
        units={
            "relative_mse": Unit("relative_mse", "parts of the teacher's mean square", 0.05),
            "mse": Unit("mse", "squared units of the hidden states"),
            "cosine": Unit("cosine", "1 - cosine"),
            "l1": Unit("l1", "units of the hidden states"),
        },
    ),
    # The teacher's own uncertainty is part of this loss, and differs from teacher to teacher.
    "token_ce": ModeFacts(
        "craft_ray.retention.token_ce:TokenCE",
        stores=frozenset({"suffix"}),
        units={"": Unit("nats", "nats a token")},
    ),
    # A divergence is 0 for every untouched student. Of a calibrated teacher, perplexity rises by about exp(KL).
    "logits": ModeFacts(
        "craft_ray.retention.logits:Logits",
        stores=frozenset({"logits"}),
        units={"": Unit("kl_nats", "nats a token from the teacher", 0.05)},
    ),
    "replay": ModeFacts(
        "craft_ray.retention.replay:Replay",
        stores=frozenset({"response"}),
        units={"": Unit("nats", "nats a token")},
        old_data="labelled",
    ),
    "l2_sp": ModeFacts(
        "craft_ray.retention.l2_sp:L2SP",
        stores=frozenset(),
        units={"": Unit("half_square", "half the squared distance of the weights")},
        old_data="none",
        distance_of_weights=True,
    ),
    # The second-order term of the divergence from the teacher, with only the diagonal of the Fisher information.
    "ewc": ModeFacts(
        "craft_ray.retention.ewc:EWC",
        stores=frozenset({"suffix"}),
        units={"": Unit("fisher_nats", "nats a token from the teacher, to second order")},
        distance_of_weights=True,
    ),
}


def _known(name: str) -> str:
    if name not in RETENTION_MODES:
        raise ValueError(f"'{name}' is not a retention mode; the modes are {', '.join(RETENTION_MODES)}")
    return name


RetentionMode = Annotated[str, AfterValidator(_known)]


def stores(modes: Iterable[str], what: Stored) -> bool:
    """Whether the teacher stores it for any of these modes."""
    return any(what in RETENTION_MODES[mode].stores for mode in modes)


def unit_of(craft: Mapping[str, Any]) -> Unit | None:
    """The unit of the budget that a section `craft` has; None if its mode or its loss is not a known one."""
    facts = RETENTION_MODES.get(str(craft.get("retention_mode", "hidden")))
    if facts is None:
        return None
    return facts.units.get("") or facts.units.get(str(craft.get("loss_type", "relative_mse")))
