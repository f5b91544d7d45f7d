"""Several old skills, each with its own anchors, budget and held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from craft_ray.config.data import DataConfig
from craft_ray.config.evaluation import EvalSet
from craft_ray.config.types import Section, checked_name

RESERVED = ("old", "new")
"""Names of scores that a run has anyway."""


def _skill_name(name: str) -> str:
    return checked_name(name, "skill", RESERVED, "what scores of a run are called")


SkillName = Annotated[str, AfterValidator(_skill_name)]


class SkillConfig(Section):
    """One of several old skills: where its anchors come from, how much of it must stay, how it is scored."""

    anchors: DataConfig | None = None
    """Its anchors. Default: the rows of `anchors.source` that name this skill in `anchors.source.columns.skill`."""
    share: float = Field(1.0, gt=0)
    """Its part of each anchor batch, relative to the other skills' shares."""
    epsilon_start: float | None = Field(None, gt=0)
    """Its budget; a schedule tightens all budgets by the same factor. Default: `craft.epsilon_start`."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Part of the teacher's score on it that must be kept. Default: `craft.keep`."""
    validation: EvalSet | None = None
    """Held-out data that are scored while the run trains; `keep` follows them."""
    evaluation: EvalSet | None = None
    """Held-out data that are scored before and after."""


def scores_of(skill: str | None) -> str:
    """The prefix of the scores of an old skill in validations and metrics; None means a single one without a name."""
    return "old" if skill is None else f"skills/{skill}"


def batch_sizes(skills: Mapping[str, SkillConfig], batch_size: int) -> dict[str, int]:
    """How many anchors of each skill a batch has: by their shares, rounded by the largest remainders.

    Raises:
        ValueError: a skill has none.
    """
    total = sum(skill.share for skill in skills.values())
    exact = {name: batch_size * skill.share / total for name, skill in skills.items()}
    sizes = {name: int(size) for name, size in exact.items()}
    by_remainder = sorted(exact, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: batch_size - sum(sizes.values())]:
        sizes[name] += 1
    for name, size in sizes.items():
        if not size:
            raise ValueError(
                f"skills.{name} has no anchor in a batch of craft.anchor_batch_size {batch_size}: raise its share "
                f"{skills[name].share:g} (all together {total:g}) or the batch size"
            )
    return sizes


def check_sources(skills: Mapping[str, SkillConfig], source: DataConfig | None) -> None:
    """Check that the anchors of every skill come from one place.

    Raises:
        ValueError: they come from two, or from none.
    """
    column = None if source is None else getattr(getattr(source, "columns", None), "skill", None)
    if not skills:
        if source is None:
            raise ValueError("anchors.source is missing: specify the inputs of the old skill, or several in skills")
        if column is not None:
            raise ValueError(f"anchors.source.columns.skill is '{column}', but there is no section skills: name them")
        return
    own = [name for name, skill in skills.items() if skill.anchors is not None]
    if source is None:
        lacking = [name for name in skills if name not in own]
        if lacking:
            raise ValueError(
                f"skills.{lacking[0]} has no anchors: specify skills.{lacking[0]}.anchors, or one anchors.source for "
                f"all skills with columns.skill"
            )
    elif own:
        raise ValueError(f"anchors.source and skills.{own[0]}.anchors are both specified: leave out one of the two")
    elif column is None:
        raise ValueError(
            "anchors.source has the anchors of all skills, and no column says which is whose: set "
            "anchors.source.columns.skill, or specify skills.*.anchors in place of it"
        )
