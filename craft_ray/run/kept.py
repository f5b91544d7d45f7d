"""How much of a skill is kept: bounds of the ratio of two scores on the same samples, and the verdict on a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from craft_ray.run.scoring import GRADED, Score, outcome
from craft_ray.statistics import (
    CONFIDENCE,
    paired_change_bounds,
    paired_mean_change_bounds,
    rate_upper_bound,
    ratio_of_sums_bounds,
)


def kept_bounds(before: Score, after: Score, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """One-sided lower and upper bound of the student's score over the teacher's. None if the teacher's is zero.

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
    if before.metric in GRADED:
        low, high = paired_mean_change_bounds([outcome(new) - outcome(old) for old, new in pairs], confidence)
        return max(0.0, 1 + low / before.value), 1 + high / before.value
    lost = sum(old["correct"] and not new["correct"] for old, new in pairs)
    gained = sum(new["correct"] and not old["correct"] for old, new in pairs)
    low, high = paired_change_bounds(lost, gained, len(pairs), confidence)
    return max(0.0, 1 + low / before.value), 1 + high / before.value


def agreement(before: Score, after: Score) -> dict[str, Any] | None:
    """A bound that needs no labels: the student's accuracy is at least the teacher's minus P(their answers differ), and
    Clopper and Pearson bound that probability. None for scores of answers that are not right or wrong."""
    if before.metric not in ("exact_match", "choice", "contains", "numeric", "regex"):
        return None
    pairs = zip(before.records, after.records, strict=True)
    differing = sum(old["prediction"] != new["prediction"] for old, new in pairs)
    return {
        "agreeing": before.samples - differing,
        "samples": before.samples,
        "lost_at_most": rate_upper_bound(differing, before.samples, CONFIDENCE),
        "confidence": CONFIDENCE,
    }


def agreement_in_words(found: dict[str, Any]) -> str:
    """The bound in a sentence."""
    return (
        f"student and teacher agree on {found['agreeing']} of {found['samples']} inputs of the old skill: at most "
        f"{100 * found['lost_at_most']:.1f} points of accuracy lost, at {found['confidence']:.0%} confidence, whatever "
        f"the labels are"
    )


def anchors_in_words(found: dict[str, Any]) -> str:
    """The bound from held-out anchors (`craft_ray/retention/continuation.py`) in a sentence."""
    tokens = f"{found['tokens']} token{'s' * (found['tokens'] != 1)}"
    return (
        f"the student continues {found['agree']} of {found['anchors']} held-out anchors exactly as the teacher did, by "
        f"up to {tokens}: on prompts like these, outputs of at most {tokens} lose at most "
        f"{100 * found['at_most_lost']:.1f} points of accuracy, at {found['confidence']:.0%} confidence, whatever the "
        f"right outputs are"
    )


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
        """About how many samples would decide, if the ratio stayed what it is. None if it is decided, or if the
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


def in_words(certificate: dict[str, Any], what: str = "the old skill") -> str:
    """A certificate in a sentence.

    Args:
        what: the skill, as the sentence calls it.
    """
    seen = " of the validation data" if certificate.get("judged_on") == "validation" else ""
    text = (
        f"keep {100 * certificate['keep']:g}% of {what}: {certificate['verdict']}; {certificate['kept']:.1%} kept on "
        f"{certificate['samples']} samples{seen}, at least {certificate['kept_low']:.1%} at "
        f"{certificate['confidence']:.0%} confidence"
    )
    if certificate["samples_to_decide"] is not None:
        text += f"; about {certificate['samples_to_decide']} samples would decide"
    return text
