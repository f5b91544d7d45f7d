"""Two models on the same held-out samples: which answers one got right and the other wrong, and whether that is chance.

A score's own interval is wide, because it allows for other samples. Two models on the same samples differ only where
their answers do, and a paired test asks whether those differences go one way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.report.arms import ARMS
from craft_ray.report.runs import FinishedRun
from craft_ray.run.kept import kept_bounds
from craft_ray.run.metrics import Record
from craft_ray.run.scoring import OF_TEXT, Score
from craft_ray.statistics import mcnemar, rate_interval, ratio_of_sums_bounds

ONE_SIDED = 0.975
"""Two bounds at this confidence are an interval of 95 %."""


@dataclass(frozen=True)
class Paired:
    """A run's answers next to those of another model: the teacher, or plain fine-tuning of the same seed."""

    run: FinishedRun
    skill: str
    against: str
    samples: int
    lost: int
    """Samples that the other model got right and the run wrong; of `token_accuracy`, those with fewer right tokens."""
    gained: int
    agreeing: int | None
    """Samples with the same answer, whatever the right one is; None for episodes."""

    @property
    def agreement(self) -> list[float] | None:
        """Wilson's interval, of 95 %, of the rate of same answers."""
        return None if self.agreeing is None else rate_interval(self.agreeing / self.samples, self.samples)

    @property
    def p(self) -> float:
        """P of at least so uneven a split of the differences, if each went either way with equal chance: McNemar's
        test; of `token_accuracy` the sign test, which is the same binomial."""
        return mcnemar(self.lost, self.gained)


def paired(runs: Sequence[FinishedRun]) -> list[Paired]:
    """Each run against the teacher on the old skill, and each other arm against plain fine-tuning on both, and on which
    of the two answers as the teacher does; of metrics whose samples are right or wrong, and of `token_accuracy`, by
    each sample's number of right tokens."""
    plain = {run.seed: run for run in runs if run.arm == "baseline"}
    found = []
    for run in runs:
        olds = list(run.config.skills) or ["old"]
        found += [_pair(run, skill, "the teacher", run, "before") for skill in olds]
        if run.arm != "baseline" and run.seed in plain:
            other = plain[run.seed]
            found += [_pair(run, skill, ARMS["baseline"].label, other, "after") for skill in (*olds, "new")]
            found += [_agreement_pair(run, skill, ARMS["baseline"].label, other) for skill in olds]
    return [pair for pair in found if pair is not None]


def _pair(run: FinishedRun, skill: str, against: str, other: FinishedRun, when: str) -> Paired | None:
    theirs, ours = _records(other, skill, when), _records(run, skill, "after")
    score = (run.result.get("skills") or {}).get(skill) or run.result.get(skill) or {}
    of_tokens = score.get("metric") == "token_accuracy"
    outcome = "hits" if of_tokens else "correct"
    if not ours or theirs.keys() != ours.keys() or not all(outcome in record for record in ours.values()):
        return None
    gains = [int(record[outcome]) - int(theirs[id_][outcome]) for id_, record in ours.items()]
    lost, gained = sum(gain < 0 for gain in gains), sum(gain > 0 for gain in gains)
    agreeing = None
    if not of_tokens and all("prediction" in record for record in (*theirs.values(), *ours.values())):
        agreeing = sum(theirs[id_]["prediction"] == record["prediction"] for id_, record in ours.items())
    return Paired(run, skill, against, len(gains), lost, gained, agreeing)


def _agreement_pair(run: FinishedRun, skill: str, against: str, other: FinishedRun) -> Paired | None:
    """The same with the teacher's answer as the right one, whatever that is."""
    teacher, theirs, ours = (
        _records(run, skill, "before"),
        _records(other, skill, "after"),
        _records(run, skill, "after"),
    )
    every = (*teacher.values(), *theirs.values(), *ours.values())
    if not ours or not teacher.keys() == theirs.keys() == ours.keys():
        return None
    if not all("correct" in record and "prediction" in record for record in every):
        return None
    agree = [
        (theirs[i]["prediction"] == t["prediction"], ours[i]["prediction"] == t["prediction"])
        for i, t in teacher.items()
    ]
    lost, gained = (sum(pair == flip for pair in agree) for flip in ((True, False), (False, True)))
    return Paired(run, f"{skill}, as the teacher's", against, len(agree), lost, gained, None)


def _records(run: FinishedRun, skill: str, when: str) -> dict[str, Record]:
    return {record["id"]: record for record in run.folder.read_predictions(f"{skill}_{when}")}


def sampling_interval(run: FinishedRun, skill: str, when: str) -> list[float] | None:
    """A 95 % interval of a single model's score over samples: Wilson's for a rate of answers or episodes (of graded
    answers, which vary less than right and wrong ones of the same mean, it is too wide); by the delta method for texts,
    whose tokens are not independent. None if the run kept no records of its samples."""
    score = run.result[skill]
    if score[when] is None:
        return None
    if score["metric"] not in OF_TEXT:
        return rate_interval(score[when], score["samples"])
    records = _scored(run, skill, when).records if _records(run, skill, when) else []
    if len(records) < 2:
        return None
    tokens, perplexity = [record["tokens"] for record in records], score["metric"] == "perplexity"
    sums = [record["nll"] if perplexity else record["hits"] for record in records]
    bounds = ratio_of_sums_bounds(sums, tokens, ONE_SIDED)
    return (
        [math.exp(min(bound, 700.0)) for bound in bounds] if perplexity else [max(0.0, bounds[0]), min(1.0, bounds[1])]
    )


def kept_interval(run: FinishedRun, skill: str, reference: FinishedRun, when: str) -> list[float] | None:
    """A 95 % interval of a run's score over that of another model on the same samples, whose own score is taken as
    exact. None if the reference's is zero, or if the records are missing."""
    if (
        not _records(run, skill, "after")
        or _records(run, skill, "after").keys() != _records(reference, skill, when).keys()
    ):
        return None
    bounds = kept_bounds(_scored(reference, skill, when), _scored(run, skill, "after"), ONE_SIDED)
    return None if bounds is None else list(bounds)


def _scored(run: FinishedRun, skill: str, when: str) -> Score:
    score: dict[str, Any] = run.result[skill]
    records = run.folder.read_predictions(f"{skill}_{when}")
    return Score(score["metric"], score[when], score["samples"], records)
