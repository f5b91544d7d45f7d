"""How much of a skill is kept: bounds of the ratio of two scores on the same samples, and the verdict on a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from craft_ray.run.scoring import Score
from craft_ray.statistics import paired_change_bounds, ratio_of_sums_bounds

CONFIDENCE = 0.95
"""Of the one-sided bounds that a certificate states."""


def kept_bounds(before: Score, after: Score, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """One-sided lower and upper bound of the student's score over the teacher's. None where the teacher's is zero.

    Both were scored on the same samples, and only where they differ is there evidence of a change. The teacher's own
    score is taken as exact. For perplexity, where lower is better, the ratio is the teacher's over the student's.
    """
    pairs = list(zip(before.records, after.records, strict=True))
    if before.metric == "perplexity":
        gains = [old["nll"] - new["nll"] for old, new in pairs]
        low, high = ratio_of_sums_bounds(gains, [new["tokens"] for _, new in pairs], confidence)
        return math.exp(low), math.exp(min(high, 700.0))
    if not before.value:
        return None
    if before.metric == "token_accuracy":
        gains = [new["hits"] - old["hits"] for old, new in pairs]
        low, high = ratio_of_sums_bounds(gains, [new["tokens"] for _, new in pairs], confidence)
        return max(0.0, 1 + low / before.value), 1 + high / before.value
    lost = sum(old["correct"] and not new["correct"] for old, new in pairs)
    gained = sum(new["correct"] and not old["correct"] for old, new in pairs)
    low, high = paired_change_bounds(lost, gained, len(pairs), confidence)
    return max(0.0, 1 + low / before.value), 1 + high / before.value


Verdict = Literal["met", "not met", "undecided"]


@dataclass(frozen=True)
class Certificate:
    """Whether a skill is kept, at a confidence of 95 %, on samples that neither training nor the budget saw."""

    keep: float
    kept: float
    low: float
    high: float
    samples: int

    @property
    def verdict(self) -> Verdict:
        if self.low >= self.keep:
            return "met"
        return "not met" if self.high < self.keep else "undecided"

    @property
    def samples_to_decide(self) -> int | None:
        """About how many samples would decide, if the ratio stayed what it is. None where it is decided, or where the
        ratio is the target itself."""
        if self.verdict != "undecided":
            return None
        half = (self.high - self.low) / 2
        distance = abs(self.kept - self.keep)
        return math.ceil(self.samples * (half / distance) ** 2) if distance > 1e-9 else None

    def as_dict(self) -> dict[str, Any]:
        """The keys of `result.json`."""
        return {
            "keep": self.keep,
            "kept": self.kept,
            "kept_low": self.low,
            "kept_high": self.high,
            "verdict": self.verdict,
            "samples": self.samples,
            "samples_to_decide": self.samples_to_decide,
            "confidence": CONFIDENCE,
        }


def in_words(certificate: dict[str, Any]) -> str:
    """A certificate in a sentence."""
    text = (
        f"keep {certificate['keep']:.0%} of the old skill: {certificate['verdict']}; {certificate['kept']:.1%} kept on "
        f"{certificate['samples']} samples, at least {certificate['kept_low']:.1%} at {certificate['confidence']:.0%} "
        f"confidence"
    )
    if certificate["samples_to_decide"] is not None:
        text += f"; about {certificate['samples_to_decide']} samples would decide"
    return text
