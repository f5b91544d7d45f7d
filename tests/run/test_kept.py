"""What is known of a ratio of scores, and the verdict on a target."""

from __future__ import annotations

import math
import random

import pytest

from craft_ray.run.kept import Certificate, in_words, kept_bounds
from craft_ray.run.scoring import Score


def answers(*correct: bool) -> Score:
    records = [{"correct": value} for value in correct]
    return Score("exact_match", sum(correct) / len(correct), len(correct), records)


def perplexity(nll: list[float], tokens: list[int]) -> Score:
    records = [{"nll": loss, "tokens": count} for loss, count in zip(nll, tokens, strict=True)]
    return Score("perplexity", math.exp(sum(nll) / sum(tokens)), len(nll), records)


def test_the_same_answers_still_leave_a_doubt() -> None:
    """40 episodes of 40: nothing was lost, and a loss of some percent would often have looked the same."""
    same = answers(*[True] * 40)
    bounds = kept_bounds(same, same)
    assert bounds is not None
    assert 0.9 < bounds[0] < 1.0 < bounds[1] < 1.1


def scores(*values: float) -> Score:
    return Score("rouge_l", sum(values) / len(values), len(values), [{"score": value} for value in values])


def test_scores_that_are_nought_or_one_are_bounded_as_answers_are() -> None:
    before, after = [i % 5 > 0 for i in range(60)], [i % 7 > 0 for i in range(60)]
    expected = kept_bounds(answers(*before), answers(*after))
    assert expected is not None
    assert kept_bounds(scores(*before), scores(*after)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_lower_bound_of_graded_scores_holds_as_often_as_it_says(seed: int) -> None:
    """A student that loses a tenth of each score on average, and of some samples all."""
    draw, held, runs = random.Random(seed), 0, 400
    for _ in range(runs):
        before = [draw.betavariate(4, 2) for _ in range(120)]
        after = [old * draw.betavariate(9, 1) for old in before]
        bounds = kept_bounds(scores(*before), scores(*after), 0.9)
        assert bounds is not None
        held += bounds[0] <= 0.9
    assert 0.86 <= held / runs <= 1.0


def test_the_same_graded_scores_still_leave_a_doubt() -> None:
    same = scores(*[0.5] * 40)
    bounds = kept_bounds(same, same)
    assert bounds is not None
    assert bounds[0] < 1.0 < bounds[1]


def test_more_samples_narrow_the_bounds() -> None:
    widths = []
    for n in (50, 200, 800):
        bounds = kept_bounds(answers(*[True] * n), answers(*[i % 10 > 0 for i in range(n)]))
        assert bounds is not None
        assert bounds[0] < 0.9 < bounds[1]
        widths.append(bounds[1] - bounds[0])
    assert widths[0] > 1.8 * widths[1] > 3 * widths[2]


def test_a_bound_at_even_odds_is_about_the_ratio_itself() -> None:
    bounds = kept_bounds(answers(*[True] * 200), answers(*[i % 10 > 0 for i in range(200)]), 0.5)
    assert bounds == pytest.approx((0.9, 0.9), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_the_lower_bound_holds_as_often_as_it_says(seed: int) -> None:
    """A student that loses a tenth of what the teacher can, and gains a tenth of what it cannot."""
    draw, held, runs = random.Random(seed), 0, 400
    true = (0.8 * 0.9 + 0.2 * 0.1) / 0.8
    for _ in range(runs):
        before = [draw.random() < 0.8 for _ in range(150)]
        after = [draw.random() < (0.9 if old else 0.1) for old in before]
        bounds = kept_bounds(answers(*before), answers(*after), 0.9)
        assert bounds is not None
        held += bounds[0] <= true
    assert 0.86 <= held / runs <= 0.95


def test_perplexity_is_the_teachers_over_the_students() -> None:
    before, after = perplexity([10.0, 12.0, 30.0], [10, 10, 20]), perplexity([11.5, 13.0, 31.5], [10, 10, 20])
    bounds = kept_bounds(before, after)
    assert bounds is not None
    assert bounds[0] < before.value / after.value < bounds[1]
    assert kept_bounds(before, before) == (1.0, 1.0), "nothing has moved in any text"


def test_token_accuracy_is_bounded_over_texts() -> None:
    """Ten tokens a text; the student loses one of the teacher's nine, or none, in turn."""
    records = [[{"hits": 9, "tokens": 10}] * 40, [{"hits": 9 - i % 2, "tokens": 10} for i in range(40)]]
    before, after = (Score("token_accuracy", sum(r["hits"] for r in rs) / 400, 40, rs) for rs in records)
    bounds = kept_bounds(before, after)
    assert bounds is not None
    # The mean loss of a text is 1/2, its standard deviation sqrt(10/39).
    half = 1.6449 * math.sqrt(10 / 39 / 40) / 9
    assert bounds == pytest.approx((17 / 18 - half, 17 / 18 + half), abs=1e-4)
    assert kept_bounds(before, before) == (1.0, 1.0)


def test_a_teacher_that_scores_zero_has_nothing_to_keep() -> None:
    assert kept_bounds(answers(False, False), answers(True, False)) is None


@pytest.mark.parametrize(
    ("low", "kept", "high", "verdict"),
    [(0.96, 0.97, 0.99, "met"), (0.90, 0.97, 0.99, "undecided"), (0.8, 0.9, 0.94, "not met"), (0.95, 1, 1, "met")],
)
def test_the_verdict_is_certain_or_it_says_so(low: float, kept: float, high: float, verdict: str) -> None:
    certificate = Certificate(0.95, kept, low, high, 100)
    assert certificate.verdict == verdict
    assert (certificate.samples_to_decide is not None) == (verdict == "undecided")
    assert f"keep 95% of the old skill: {verdict}; {kept:.1%} kept on 100 samples" in in_words(certificate.as_dict())


def test_the_samples_that_would_decide_do_decide() -> None:
    """A bound narrows with the root of the number of samples."""
    short = Certificate(0.95, 0.97, 0.93, 1.01, 100)
    needed = short.samples_to_decide
    assert needed is not None
    half = 0.04 * math.sqrt(100 / needed)
    assert Certificate(0.95, 0.97, 0.97 - half - 1e-12, 0.97 + half, needed).low == pytest.approx(0.95, abs=1e-3)
