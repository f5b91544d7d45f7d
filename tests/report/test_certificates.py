"""The certificates at the top of a report: one for each run and old skill that was held to a target or a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from craft_ray.report.certificates import certificates, verdicts
from craft_ray.report.runs import read_runs
from craft_ray.run.folder import RunFolder
from craft_ray.run.kept import Certificate
from craft_ray.run.metrics import result_lines
from tests.support.reports import Page, report, write_run


def changed(run: RunFolder, **changes: Any) -> RunFolder:
    """The run with other values in its result."""
    run.write_result(json.loads(run.result.read_text()) | changes)
    return run


def certificate(keep: float, low: float, high: float, judged_on: str = "evaluation") -> dict[str, Any]:
    return Certificate(keep, (low + high) / 2, low, high, 400).as_dict() | {"judged_on": judged_on}


def of_skill(loss: float, **more: Any) -> dict[str, Any]:
    return {
        "metric": "exact_match", "before": 0.8, "after": 0.76, "ratio": 0.95, "ratio_low": 0.91, "samples": 400,
        "retention_loss": loss, "epsilon": 0.05, "feasible": loss <= 0.05, "heldout_anchors": 50, "lambda": 2.0,
        "lambda_max": 10.0, "slackness": 2.0 * (loss - 0.05), "multiplier": "adaptive", **more,
    }  # fmt: skip


def test_each_skill_has_a_sentence_and_a_row(tmp_path: Path) -> None:
    skills = {
        "drawer": of_skill(0.02, certificate=certificate(0.95, 0.955, 0.985)),
        "door": of_skill(0.03, certificate=certificate(0.95, 0.93, 0.99)),
        "window": of_skill(0.06),
    }
    run = changed(write_run(tmp_path, "hidden", 0, predictions=False), skills=skills, stationarity=0.25)
    text = Page(report([run], tmp_path)[1]).text
    before, _ = text.split("Scores", 1)
    assert "3 certificates: 1 met, 1 not met, 1 undecided" in before
    for sentence in (
        "CRaFT hidden, seed 0: keep 95% of the skill drawer: met; 97.0% kept on 400 samples, at least 95.5% at 95% "
        "confidence.",
        "CRaFT hidden, seed 0: keep 95% of the skill door: undecided; 96.0% kept on 400 samples, at least 93.0% at 95% "
        "confidence; about 3600 samples would decide.",
        "CRaFT hidden, seed 0: budget ε 0.05 of the skill window: not met; retention loss 0.0600 on 50 held-out "
        "anchors; with λ 2.00, λ (L_ret − ε) is 0.0200.",
    ):
        assert sentence in before
    for row in (
        "drawer keep 95 % 97.0 % at least 95.5 % met 0.0200 0.0500 2.00 -0.0600 0.250",
        "door keep 95 % 96.0 % at least 93.0 % undecided 3600 samples would decide 0.0300 0.0500 2.00 -0.0400 0.250",
        "window ε 0.05 95.0 % at least 91.0 % not met 0.0600 0.0500 2.00 0.0200 0.250",
    ):
        assert row in before


def test_a_run_without_a_target_has_a_certificate_of_its_budget(tmp_path: Path) -> None:
    met = changed(
        write_run(tmp_path, "hidden", 0), slackness=-0.025, stationarity=0.25, multiplier="adaptive", lambda_max=10.0
    )
    free = changed(
        write_run(tmp_path, "hidden", 1), slackness=0.0, stationarity=1.0, multiplier="adaptive", **{"lambda": 0.0}
    )
    missed = write_run(tmp_path, "token_ce", 0, loss=0.2)
    missed = changed(missed, slackness=1.5, stationarity=None, multiplier="adaptive", lambda_max=10.0, **{"lambda": 10})
    assert [row["sentence"] for row in certificates(read_runs([met, free, missed]))] == [
        "CRaFT token_ce, seed 0: budget ε 0.05: not met; retention loss 0.200 on 50 held-out anchors; with λ 10.0 at "
        "its cap, λ (L_ret − ε) is 1.50.",
        "CRaFT hidden, seed 0: budget ε 0.05: met; retention loss 0.0400 on 50 held-out anchors; with λ 2.50, "
        "λ (L_ret − ε) is -0.0250; the gradients balance except for 25.0 % of the new skill's.",
        "CRaFT hidden, seed 1: budget ε 0.05: met; retention loss 0.0400 on 50 held-out anchors; λ is 0: at the end "
        "the budget cost nothing.",
    ]
    assert verdicts(certificates(read_runs([met, missed]))) == "2 certificates: 1 met, 1 not met"


def test_what_was_only_measured_has_none(tmp_path: Path) -> None:
    plain = write_run(tmp_path, "baseline", 0)
    fixed = changed(write_run(tmp_path, "fixed", 0, mode="hidden"), multiplier="fixed")
    nothing = write_run(tmp_path, "hidden", 0, loss=None)
    nothing.metrics.write_text("")
    assert certificates(read_runs([plain, fixed, nothing])) == []
    assert "certificate" not in Page(report([plain, fixed, nothing], tmp_path)[1]).text.split("Scores", 1)[0]


def test_a_fixed_skill_beside_a_held_one_has_none(tmp_path: Path) -> None:
    skills = {"held": of_skill(0.02), "fixed": of_skill(0.9, multiplier="fixed")}
    run = changed(write_run(tmp_path, "hidden", 0, predictions=False), skills=skills, multiplier="adaptive")
    assert [row["skill"] for row in certificates(read_runs([run]))] == ["held"]


@pytest.mark.parametrize("skills", [False, True])
def test_an_interpolated_run_has_its_certificate_without_a_budget(skills: bool, tmp_path: Path) -> None:
    runs = []
    for seed in (0, 1):
        run = write_run(tmp_path, "mixed", seed, loss=None, predictions=False, mode="hidden")
        run.metrics.write_text("")
        own = {"certificate": certificate(0.95, 0.96, 0.98, "validation"), "feasible": True}
        scores = {"metric": "exact_match", "before": 0.8, "after": 0.78, "ratio": 0.97, "samples": 400}
        runs.append(changed(run, **own, **({"skills": {"drawer": {**scores, **own}}} if skills else {})))
    content, html = report(runs, tmp_path)
    text = Page(html).text
    whose = "the skill drawer" if skills else "the old skill"
    assert (
        f"CRaFT mixed, seed 0: keep 95% of {whose}: met; 97.0% kept on 400 samples of the validation data, at least "
        "96.0% at 95% confidence."
    ) in text
    assert "target kept in 2 of 2 runs" in text
    assert content["summary"]["mixed"]["epsilon"] is None
    assert any("keep 95% of" in line for line in result_lines(content["runs"][-1]))


def test_many_certificates_are_folded(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "hidden", seed, predictions=False) for seed in range(9)]
    folded, opened = (report(some, tmp_path)[1] for some in (runs, runs[:8]))
    assert '<details class="certified"><summary>9 certificates: 9 met</summary>' in folded
    assert '<details class="certified" open><summary>8 certificates: 8 met</summary>' in opened
