"""Numbers and verdicts as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from craft_ray.config.modes import RETENTION_MODES
from craft_ray.report.runs import FinishedRun
from craft_ray.run.kept import anchors_in_words
from craft_ray.run.metrics import unreached
from craft_ray.run.scoring import HIGHER_IS_BETTER

NONE = "–"

METRICS = {
    "exact_match": "exact match",
    "contains": "answer contained",
    "numeric": "correct number",
    "regex": "pattern found",
    "rouge_l": "ROUGE-L",
    "function": "own metric",
    "choice": "correct choice",
    "perplexity": "perplexity ↓",
    "token_accuracy": "token accuracy",
    "lm_eval": "harness tasks",
    "success": "success rate",
}
LOSSES = {
    "relative_mse": "relative squared error",
    "mse": "mean squared error",
    "cosine": "1 − cosine",
    "l1": "mean absolute error",
}
OLD_DATA = {
    "none": "Without old data",
    "unlabelled": "With unlabelled old data",
    "labelled": "With labelled old data",
}
"""The classes of arms by what training needs of the old skill."""


def percent(value: float | None) -> str:
    """A ratio as a percentage, e.g. `98.3 %`."""
    return NONE if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Three significant digits, e.g. `0.0296`."""
    if value is None:
        return NONE
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}" if digits <= 5 else f"{value:.2e}"


def probability(value: float) -> str:
    """Two significant digits; a very small one by its bound."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def score_of(value: float | None, metric: str) -> str:
    """A score: a percentage for answers, a number for perplexity."""
    return percent(value) if HIGHER_IS_BETTER[metric] else number(value)


def interval(bounds: Sequence[float] | None, form: Callable[[float], str]) -> str | None:
    """An interval with its unit once: `[97.7, 99.1] %`. None stays None."""
    if bounds is None:
        return None
    low, high = (form(bound) for bound in bounds)
    unit = " %" if low.endswith(" %") else ""
    return f"[{low.removesuffix(unit)}, {high.removesuffix(unit)}]{unit}"


def relative_to(whose: str, metric: str) -> str:
    """What a relative score is relative to: `of the teacher's`, for episodes `of the teacher's success`."""
    return f"of {whose}{' success' if metric == 'success' else ''}"


def sample_count(samples: int, skill: str, metric: str) -> str:
    """What a skill was scored on: `20 held-out samples of the old skill`, or `n = 20 episodes of the old skill`."""
    if metric == "success":
        return f"n = {samples} episodes of the {skill} skill"
    return f"{samples} held-out samples of the {skill} skill"


def is_held(run: FinishedRun) -> bool:
    """Whether a run was held to a budget or a target. Plain fine-tuning and fixed penalties are only measured."""
    if "certificate" in run.result:
        return True
    return run.config.craft.enabled and run.result.get("multiplier") != "fixed"


def loss_unit(run: FinishedRun) -> str:
    """The unit of a run's retention loss."""
    craft = run.config.craft
    unit = RETENTION_MODES[craft.retention_mode].unit(craft.loss_type)
    return LOSSES.get(unit.name, unit.words)


def loss_units(runs: Sequence[FinishedRun]) -> list[str]:
    """The units of all retention losses that were measured."""
    return list(dict.fromkeys(loss_unit(run) for run in runs if run.result["retention_loss"] is not None))


def workers_of(run: FinishedRun) -> str:
    """The worker processes of a run."""
    workers = run.config.workers
    device = "on a GPU" if workers.use_gpu else "on the CPU"
    if workers.num_workers == 0:
        return f"in one process, {device}"
    return f"{workers.count} of {workers.threads} thread(s) each, {device}"


def judged_on(run: FinishedRun) -> str | None:
    """The anchors on which the budget was judged. None if it was not judged."""
    if run.result["retention_loss"] is None:
        return None
    return "held-out anchors" if run.result["heldout_anchors"] else "the training anchors (none were held out)"


def headline(runs: Sequence[FinishedRun], summary: dict[str, dict[str, Any]]) -> list[str]:
    """The outcome, in a plain sentence for each arm."""
    return [_sentence([run for run in runs if run.arm == arm], numbers) for arm, numbers in summary.items()]


def continuations(runs: Sequence[FinishedRun]) -> list[str]:
    """For each arm and old skill, how many held-out anchors are continued as the teacher did; of several seeds the one
    with the least agreement."""
    lines = []
    for arm in dict.fromkeys(run.arm for run in runs):
        seeds = [(run, skill, found) for run in runs if run.arm == arm for skill, found in _agreements(run).items()]
        for skill in dict.fromkeys(skill for _, skill, _ in seeds):
            own = [(run, found) for run, of, found in seeds if of == skill]
            run, found = max(own, key=lambda each: each[1]["at_most_lost"])
            least = f" (the least of {len(own)} seeds)" if len(own) > 1 else ""
            of_skill = "" if skill is None else f", {skill}"
            lines.append(f"{run.style.label}, seed {run.seed}{least}{of_skill}: {anchors_in_words(found)}")
    return lines


def _agreements(run: FinishedRun) -> dict[str | None, dict[str, Any]]:
    """The agreement on held-out anchors by skill; None stands for the one of a config without names."""
    of: dict[str | None, dict[str, Any]] = run.result.get("skills") or {None: run.result}
    return {skill: found["anchor_agreement"] for skill, found in of.items() if "anchor_agreement" in found}


def _sentence(runs: Sequence[FinishedRun], numbers: dict[str, Any]) -> str:
    run = runs[0]
    parts = [_old_and_new(run, numbers)]
    if numbers["feasible"] is not None and is_held(run):
        held = "target kept" if "certificate" in run.result else f"budget met on {judged_on(run)}"
        verdict = f"{numbers['feasible']} of {numbers['runs']} {'run' if numbers['runs'] == 1 else 'runs'}"
        of_models = {} if "certificate" in run.result else {unreached(run.result): None for run in runs}
        parts.append(f"{held} in {verdict}{''.join(of_models)}")
    return f"{run.style.label} {'; '.join(parts)}."


def _old_and_new(run: FinishedRun, numbers: dict[str, Any]) -> str:
    old, new = run.result["old"], run.result["new"]
    words = []
    if numbers["old_after"] is not None:
        if not HIGHER_IS_BETTER[old["metric"]]:
            words.append(
                f"took the old skill's perplexity from {number(old['before'])} to {number(numbers['old_after'])}"
            )
        elif numbers["old_ratio"] is None:
            words.append(f"scores {percent(numbers['old_after'])} on the old skill, the teacher 0 %")
        else:
            whole = "the teacher's success on the old skill" if old["metric"] == "success" else "the old skill"
            words.append(f"kept {percent(numbers['old_ratio'])} of {whole}")
    if numbers["new_after"] is not None:
        reached = score_of(numbers["new_after"], new["metric"])
        if run.arm != "baseline" and numbers["new_ratio"] is not None:
            whole = "success on the new skill" if new["metric"] == "success" else "new skill"
            words.append(f"reached {percent(numbers['new_ratio'])} of plain fine-tuning's {whole}")
        elif HIGHER_IS_BETTER[new["metric"]]:
            words.append(f"scores {reached} on the new skill")
        else:
            words.append(f"took the new skill's perplexity from {number(new['before'])} to {reached}")
    return " and ".join(words) or f"trained for {run.result['steps']} steps, without an evaluation"
