"""What a run's result says about its budgets: for one old skill, or for each of several and for all together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Judged = Mapping[str | None, dict[str, Any]]
"""By skill; None stands for the one of a config without names."""


def judged(losses: Judged, kept: Judged, result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `result.json` about retention.

    With several skills, `skills` has each one's scores, L_ret, budget and certificate; next to it are the numbers of
    the skill whose L_ret is the furthest above its budget, of the certificate with the least margin, and of the least
    agreement on anchors. `feasible` is whether every skill met what was asked of it. Nothing is asked of a skill whose
    multiplier is fixed; where no multiplier follows a budget, all skills count.

    Args:
        losses: L_ret against its budget (`Constraint.certificate`); none of a run that trained nothing.
        kept: the part of the teacher's score against its target, where one is stated (`HeldOut.certificates`).
        result: with `skills`, the scores of each.
    """
    unmeasured = {"retention_loss": None, "epsilon": None, "feasible": None}
    if not losses and not kept:
        return unmeasured
    if None in losses or None in kept:
        return {**losses.get(None, unmeasured), **kept.get(None, {})}
    names = {**losses, **kept, **result["skills"]}
    skills = {
        str(name): {**result["skills"].get(name, {}), **losses.get(name, {}), **kept.get(name, {})} for name in names
    }
    worst = max(losses.values(), key=lambda found: found["retention_loss"] / found["epsilon"], default=unmeasured)
    held = [skill for skill in skills.values() if skill.get("multiplier") == "adaptive"]
    asked = held or [skill for skill in skills.values() if "feasible" in skill]
    together = {**worst, "feasible": all(skill["feasible"] for skill in asked), "skills": skills}
    if held:
        together["multiplier"] = "adaptive"
    certificates = [skill["certificate"] for skill in skills.values() if "certificate" in skill]
    if certificates:
        together["certificate"] = min(certificates, key=lambda found: found["kept"] - found["keep"])
    agreements = [found["anchor_agreement"] for found in losses.values() if "anchor_agreement" in found]
    if agreements:
        together["anchor_agreement"] = max(agreements, key=lambda found: found["at_most_lost"])
    return together
