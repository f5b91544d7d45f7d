"""The report: its numbers against hand-computed ones, and a self-contained page, whatever a run lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from craft_ray.errors import ConfigError
from craft_ray.report.examples import examples
from craft_ray.report.html import write_report
from craft_ray.report.runs import read_runs
from craft_ray.report.summary import summarize
from craft_ray.report.tables import report_tables
from craft_ray.report.thin import curve
from craft_ray.run.folder import RunFolder
from tests.support.reports import EVIL, Page, data_file, report, write_run


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Plain fine-tuning and both CRaFT arms on seeds 0, 1, 2. Shared: do not write into them."""
    tmp_path = tmp_path_factory.mktemp("arms")
    data_file(tmp_path)
    runs = []
    for seed, (plain_new, hidden_new) in enumerate([(0.9, 0.9), (0.8, 0.76), (1.0, 0.9)]):
        runs.append(write_run(tmp_path, "baseline", seed, old=(0.8, 0.2), new=(0.1, plain_new), loss=0.7))
        hidden_old = (0.8, 0.72 + 0.04 * seed)
        runs.append(
            write_run(tmp_path, "hidden", seed, old=hidden_old, new=(0.1, hidden_new), loss=0.04 + 0.009 * seed)
        )
        runs.append(write_run(tmp_path, "token_ce", seed, loss=0.09, epsilon_start=0.1))
    return runs


@pytest.fixture(scope="module")
def three_arms_report(
    three_arms: list[RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    return report(three_arms, tmp_path_factory.mktemp("report"), title=EVIL)


# -- numbers


def test_summary_by_hand(three_arms: list[RunFolder]) -> None:
    results = [{**run.finished(), "path": str(run.path)} for run in three_arms]  # type: ignore[dict-item]
    summary = summarize(results)
    assert list(summary) == ["baseline", "token_ce", "hidden"]
    hidden = summary["hidden"]
    assert hidden["runs"] == 3
    # 0.72, 0.76 and 0.80 of the teacher's 0.8; standard deviation 0.05
    assert hidden["old_ratio"] == pytest.approx(0.95)
    assert hidden["old_ratio_interval"] == pytest.approx([0.95 - 0.1242069, 0.95 + 0.1242069], abs=1e-6)
    # each seed relative to its own plain run: 0.9/0.9, 0.76/0.8, 0.9/1.0 (the ratio of the means would be 0.948)
    assert hidden["new_ratio"] == pytest.approx((1 + 0.95 + 0.9) / 3)
    assert hidden["old_after"] == pytest.approx(0.76)
    assert hidden["retention_loss"] == pytest.approx(0.049)
    assert (hidden["epsilon"], hidden["feasible"]) == (0.05, 2)
    assert summary["baseline"]["old_ratio"] == pytest.approx(0.25)
    assert summary["baseline"]["new_ratio"] == 1
    assert summary["baseline"]["feasible"] == 0
    assert summary["token_ce"]["epsilon"] == 0.1


def test_perplexity_ratios_are_inverted(tmp_path: Path) -> None:
    data_file(tmp_path)
    plain = write_run(tmp_path, "baseline", 0, old=(2.0, 8.0), new=(9.0, 3.0), metric="perplexity")
    hidden = write_run(tmp_path, "hidden", 0, old=(2.0, 2.5), new=(9.0, 4.0), metric="perplexity")
    content, text = report([plain, hidden], tmp_path)
    assert content["summary"]["baseline"]["old_ratio"] == 0.25
    assert content["summary"]["hidden"]["old_ratio"] == 0.8
    assert content["summary"]["hidden"]["new_ratio"] == 0.75
    page = Page(text)
    assert "took the old skill's perplexity from 2.00 to 2.50" in page.text
    assert "inverse perplexity" in page.text
    assert "12.5 nats per token" in page.text, "the sample that differs most has (6 + 19) / 2 nats a token"
    assert page.text.index("12.5 nats per token") < page.text.index("12.0 nats per token")


def test_replies_stand_side_by_side(tmp_path: Path) -> None:
    data_file(tmp_path)
    runs = [write_run(tmp_path, arm, 0, metric="token_accuracy", replies=5) for arm in ("baseline", "hidden")]
    page = Page(report(runs, tmp_path)[1])
    assert "Shown are the first 5 in data order, with what each model replies" in page.text
    for row in range(5):
        assert page.text.count(f"yes {row} (1.00 nats per token)") == (3 if row < 3 else 2), "teacher, CRaFT, plain"
    assert page.text.count("no 3 (4.50 nats per token)") == page.text.count("no 4 (5.00 nats per token)") == 1
    assert "yes 5" not in page.text


def test_no_plain_run_no_new_ratio(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path, "hidden", 0), write_run(tmp_path, "hidden", 1)])
    plain = read_runs([write_run(tmp_path, "baseline", 0)])
    assert summarize([run.result for run in runs])["hidden"]["new_ratio"] is None
    summary = summarize([run.result for run in runs + plain])
    # seed 1 has no plain run, and a mean over seed 0 would look like one over both
    assert summary["hidden"]["new_ratio"] is None
    assert summary["hidden"]["old_ratio"] == 0.5


def test_teacher_without_the_skill(tmp_path: Path) -> None:
    data_file(tmp_path)
    run = write_run(tmp_path, "hidden", 0, old=(0.0, 0.3))
    content, text = report([run], tmp_path)
    assert content["summary"]["hidden"]["old_ratio"] is None
    assert "scores 30.0 % on the old skill, the teacher 0 %" in Page(text).text


# -- the page


def test_page_shows_the_numbers_of_the_result(three_arms_report: tuple[dict[str, Any], str]) -> None:
    content, text = three_arms_report
    page = Page(text)
    for numbers in content["summary"].values():
        for key in ("old_after", "old_ratio", "new_after", "new_ratio"):
            assert f"{100 * numbers[key]:.1f} %" in page.text
            low, high = numbers[f"{key}_interval"]
            assert key == "new_ratio" or f"[{100 * low:.1f}, {100 * high:.1f}] %" in page.text
    assert "only measured" in page.text, "plain fine-tuning is not held to a budget"
    assert content["summary"]["baseline"]["feasible"] == 0
    assert "0 of 3" not in page.text
    assert all(f"{content['summary'][arm]['feasible']} of 3" in page.text for arm in ("hidden", "token_ce"))
    assert "CRaFT hidden kept 95.0 % of the old skill" in page.text
    assert "budget met on held-out anchors in 2 of 3 runs" in page.text
    assert len(content["runs"]) == 9
    assert all(Path(run["path"]).name in page.text for run in content["runs"])
    assert content["command"] in page.text
    assert content["environment"][0]["packages"]["torch"] in page.text
    assert "feedc0de" in page.text
    assert "cafe" in page.text
    assert "craft.epsilon_start" in page.text


def test_page_is_self_contained(three_arms_report: tuple[dict[str, Any], str]) -> None:
    text = three_arms_report[1]
    page = Page(text)
    assert page.references, "it has images"
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    inside = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert inside <= set(page.ids)


def test_pictures_are_those_that_plain_lost(three_arms_report: tuple[dict[str, Any], str]) -> None:
    text = three_arms_report[1]
    page = Page(text)
    assert re.findall(r'alt="sample (\w+)"', text) == [f"s{row}" for row in range(3, 15)]
    assert "got 17 wrong that CRaFT hidden got right, and 0 the other way round" in page.text


def test_user_text_is_escaped(three_arms_report: tuple[dict[str, Any], str]) -> None:
    page = Page(three_arms_report[1])
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 10, "title, prompts and predictions are shown as they are"


def test_samples_that_are_gone_or_changed_are_reported(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path, "baseline", 0), write_run(tmp_path, "hidden", 0)])
    for rows, problem in ((0, "could not be read again"), (5, "has changed since the runs were scored")):
        if rows:
            data_file(tmp_path, rows)
        found = examples(runs)
        assert found is not None
        assert problem in str(found.problem)
        assert len(found.chosen) == 12
        assert all(example.picture is None for example in found.chosen)


def without_evaluation(folder: Path) -> RunFolder:
    return write_run(folder, "hidden", 0, old=None, new=None)


def without_anchors(folder: Path) -> RunFolder:
    return write_run(folder, "baseline", 0, loss=None)


def with_nothing(folder: Path) -> RunFolder:
    return write_run(folder, "baseline", 0, old=None, new=None, loss=None)


def with_gaps(folder: Path) -> RunFolder:
    return write_run(folder, "hidden", 0, retention_freq=4)


def without_metrics(folder: Path) -> RunFolder:
    run = write_run(folder, "hidden", 0)
    run.metrics.unlink()
    return run


def without_old_skill(folder: Path) -> RunFolder:
    return write_run(folder, "token_ce", 0, old=None)


def without_environment(folder: Path) -> RunFolder:
    run = write_run(folder, "hidden", 0)
    (run.path / "env.json").unlink()
    (run.path / "teacher.json").unlink()
    return run


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (without_evaluation, "trained without an evaluation"),
        (without_anchors, "no retention budget was judged"),
        (with_nothing, "trained for 12 steps, without an evaluation"),
        (with_gaps, "cosine of the gradients"),
        (without_metrics, "budget met on held-out anchors in 1 of 1 run."),
        (without_old_skill, "scores 90.0 % on the new skill"),
        (without_environment, "The environment was not recorded"),
    ],
)
def test_single_run_with_missing_parts(make: Callable[[Path], RunFolder], says: str, tmp_path: Path) -> None:
    content, text = report([make(tmp_path)], tmp_path)
    page = Page(text)
    assert says in page.text
    assert "One seed" in page.text or "without an evaluation" in page.text
    assert all(numbers["old_ratio_interval"] is None for numbers in content["summary"].values())
    assert "None" not in page.text.replace("null", "")


def test_budget_judged_on_training_anchors_is_labelled_so(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0, anchor_holdout=0.0)
    run.write_result({**run.finished(), "heldout_anchors": 0})  # type: ignore[dict-item]
    text = Page(report([run], tmp_path)[1]).text
    assert "held-out anchors" not in text
    assert "budget met on the training anchors (none were held out)" in text


def test_long_curves_are_thinned_with_their_extremes() -> None:
    values = [None if step % 2 else float(step) for step in range(10_000)]
    thinned = curve(range(10_000), values, most=100)
    assert len(thinned.mean) == 100
    assert thinned.bin_size == 50
    assert (thinned.low[0], thinned.high[-1]) == (0.0, 9998.0)
    assert (thinned.low <= thinned.mean).all()
    assert len(curve([1, 2], [None, None]).mean) == 0


# -- runs that are not comparable are refused


def test_runs_that_are_not_comparable_are_refused(tmp_path: Path) -> None:
    hidden = write_run(tmp_path / "a", "hidden", 0)
    for other, complaint in (
        (write_run(tmp_path / "b", "hidden", 0), "both hidden runs of seed 0"),
        (write_run(tmp_path / "c", "hidden", 1, epsilon_start=0.06), "craft.epsilon_start is 0.05"),
        (write_run(tmp_path / "d", "baseline", 0, metric="perplexity"), "metric of the old skill"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            report([hidden, other], tmp_path)
    foreign = write_run(tmp_path / "e", "baseline", 0)
    (foreign.path / "teacher.json").write_text('{"weights": "another"}')
    with pytest.raises(ConfigError, match="the teacher is another"):
        report([hidden, foreign], tmp_path)


def test_runs_of_one_arm_may_differ_in_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), "hidden", seed) for seed in range(2)]
    config = runs[1].config()
    runs[1].write_config(config.changed({"train.checkpoint_every": 7, "train.log_every": 3, "about": {"old": "x"}}))
    report(runs, tmp_path)
    runs[1].write_config(config.changed({"train.learning_rate": 0.5}))
    with pytest.raises(ConfigError, match=r"train\.learning_rate is .*, but 0\.5 in"):
        report(runs, tmp_path)


def with_skills(run: RunFolder, worst: str, metric: str = "exact_match", **epsilons: float) -> RunFolder:
    """A run with a budget for each skill, of which `worst` is the furthest above it."""
    result = json.loads(run.result.read_text())
    result["skills"] = {
        name: {
            **result["old"], "retention_loss": 0.04, "epsilon": epsilon, "feasible": name != worst, "lambda": 1.0,
            "heldout_anchors": 25,
        }
        for name, epsilon in epsilons.items()
    }  # fmt: skip
    result |= {
        "epsilon": epsilons[worst],
        "feasible": False,
        "old": {**result["old"], "metric": metric, "skill": worst},
    }
    run.result.write_text(json.dumps(result))
    return run


def test_skills_have_a_budget_each_and_any_of_them_may_be_the_worst(tmp_path: Path) -> None:
    budgets = {"drawer": 0.02, "door": 0.05}
    runs = [
        with_skills(write_run(tmp_path / str(seed), "hidden", seed, predictions=False), worst, **budgets)
        for seed, worst in enumerate(budgets)
    ]
    result, _ = report(runs, tmp_path)
    assert result["summary"]["hidden"]["epsilon"] is None
    with_skills(runs[1], "door", drawer=0.03, door=0.05)
    with pytest.raises(ConfigError, match="report runs of one budget together"):
        report(runs, tmp_path)


def test_scores_of_different_metrics_have_no_mean(tmp_path: Path) -> None:
    """Of several skills the worst stands for all: in one run an exact match, in another a perplexity."""
    budgets = {"drawer": 0.02, "door": 0.05}
    runs = [
        with_skills(write_run(tmp_path / str(seed), "hidden", seed, predictions=False), worst, metric, **budgets)
        for seed, (worst, metric) in enumerate((("drawer", "exact_match"), ("door", "perplexity")))
    ]
    result, page = report(runs, tmp_path)
    numbers = result["summary"]["hidden"]
    assert numbers["old_after"] is None
    assert numbers["old_ratio"] is not None
    assert "several metrics" in page
    (arms,) = [table for table in report_tables(read_runs(runs)) if table.name == "arms"]
    assert "Old skill, several metrics" in arms.headings
    assert arms.shown[0][1] == arms.shown[1][1] == "–"


def test_unfinished_runs_and_own_folders_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0)
    with pytest.raises(ConfigError, match="run directory"):
        write_report([run], run.path, title="", command="")
    run.result.unlink()
    with pytest.raises(ConfigError, match="--resume"):
        report([run], tmp_path)
    with pytest.raises(ConfigError, match="at least one run"):
        report([], tmp_path)
