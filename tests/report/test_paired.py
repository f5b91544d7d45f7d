"""Paired tests, intervals over samples, and what the report says was compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craft_ray.report.about import facts, model_name
from craft_ray.report.losses import loss_plot
from craft_ray.report.paired import kept_interval, paired, sampling_interval
from craft_ray.report.replies import replies
from craft_ray.report.runs import read_runs
from craft_ray.run.metrics import Record
from craft_ray.statistics import mcnemar, rate_interval
from tests.support.reports import Page, data_file, outcome, report, write_run


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0, "an even split is no evidence"
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(0, 3000) < 1e-300, "large counts do not overflow"


def test_flips_are_counted_against_the_teacher_and_against_plain_fine_tuning(tmp_path: Path) -> None:
    data_file(tmp_path)
    runs = [write_run(tmp_path, "baseline", 0, old=(1.0, 0.15)), write_run(tmp_path, "hidden", 0, old=(1.0, 1.0))]
    for run, right in ((runs[0], 4), (runs[1], 6)):
        run.write_predictions("new_after", [outcome(row, row < right, "exact_match") for row in range(20)])
    found = {(pair.run.arm, pair.skill, pair.against): pair for pair in paired(read_runs(runs))}
    counts = {key: (pair.lost, pair.gained, pair.samples) for key, pair in found.items()}
    assert counts == {
        ("baseline", "old", "the teacher"): (17, 0, 20),
        ("hidden", "old", "the teacher"): (0, 0, 20),
        ("hidden", "old", "Plain fine-tuning"): (0, 17, 20),
        ("hidden", "old, as the teacher's", "Plain fine-tuning"): (0, 17, 20),
        ("hidden", "new", "Plain fine-tuning"): (0, 2, 20),
    }
    wrong = [outcome(row, row != 3, "exact_match") for row in range(20)]
    runs[1].write_predictions("old_before", wrong)  # the teacher errs on one, and the arm no longer does
    counted = {(pair.skill, pair.against): (pair.lost, pair.gained) for pair in paired(read_runs(runs[1:] + runs[:1]))}
    assert counted["old, as the teacher's", "Plain fine-tuning"][1] < 17, "a right answer that the teacher has not"
    assert found["hidden", "new", "Plain fine-tuning"].p == 0.5, "two differences decide nothing"
    text = Page(report(runs, tmp_path)[1]).text
    assert "Right → wrong Wrong → right P Same answer" in text
    assert "Plain fine-tuning 20 0 2 0.5 18 of 20 [69.9, 97.2] %" in text, "the same mistakes are the same answer"


def test_token_accuracy_has_a_sign_test_over_its_samples(tmp_path: Path) -> None:
    data_file(tmp_path)
    made = [write_run(tmp_path, arm, 0, metric="token_accuracy") for arm in ("baseline", "hidden")]

    def texts(hits: list[int]) -> list[Record]:
        return [{"id": f"s{row}", "nll": 9.0, "tokens": 30, "hits": each} for row, each in enumerate(hits)]

    for run, hits in zip(made, ([3, 9, 9, 9, 9, 9, 9, 9, 9, 12], [9, 10, 10, 10, 10, 10, 10, 10, 10, 10]), strict=True):
        run.write_predictions("old_before", texts([10] * 10))
        run.write_predictions("old_after", texts(hits))
    found = {(pair.run.arm, pair.skill, pair.against): pair for pair in paired(read_runs(made))}
    counts = {key: (pair.lost, pair.gained) for key, pair in found.items() if key[1].startswith("old")}
    assert counts == {
        ("baseline", "old", "the teacher"): (9, 1),
        ("hidden", "old", "the teacher"): (1, 0),
        ("hidden", "old", "Plain fine-tuning"): (1, 9),
    }
    assert found["hidden", "old", "Plain fine-tuning"].p == pytest.approx(2 * (1 + 10) / 2**10)
    assert found["hidden", "old", "Plain fine-tuning"].agreeing is None
    assert "Plain fine-tuning 10 1 9 0.021 –" in Page(report(made, tmp_path)[1]).text
    skills = {"skills.walking.anchors": {"path": "walking.jsonl"}, "evaluation.old": None}
    for run in made:
        run.write_config(run.config().changed(skills))
        result = run.finished() or {}
        run.write_result({**result, "skills": {"walking": result["old"]}})
        for when in ("before", "after"):
            run.write_predictions(f"walking_{when}", run.read_predictions(f"old_{when}"))
    counted = {(pair.run.arm, pair.skill): (pair.lost, pair.gained) for pair in paired(read_runs(made))}
    assert counted["hidden", "walking"] == (1, 9), "one of several skills"


def test_a_single_run_has_intervals_over_its_samples(tmp_path: Path) -> None:
    data_file(tmp_path)
    (run,) = read_runs([write_run(tmp_path, "hidden", 0, old=(1.0, 1.0))])
    assert sampling_interval(run, "old", "after") == pytest.approx(rate_interval(1.0, 20))
    low, high = kept_interval(run, "old", run, "before") or []
    assert 0.75 < low < 1.0 < high, "all of 20 answers kept does not mean that all of many are"
    text = Page(report([read_runs([run.folder])[0].folder], tmp_path)[1]).text
    assert "intervals over what was scored, not over seeds" in text


def test_the_interval_of_a_text_score_holds_its_samples_together(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path, "hidden", 0, old=(1.0, 0.5), metric="token_accuracy")])

    def interval(records: list[Record]) -> list[float]:
        run.folder.write_predictions("old_after", records)
        found = sampling_interval(run, "old", "after")
        assert found is not None
        return found

    # In half of the samples every token is right: as uncertain as 20 answers are, not as 2,000 tokens.
    low, high = interval([{"id": f"s{i}", "tokens": 100, "hits": 100 * (i % 2), "nll": 1.0} for i in range(20)])
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 19**0.5, rel=0.01)
    low, high = interval([{"id": f"s{i}", "tokens": 100, "hits": 50, "nll": 1.0} for i in range(20)])
    assert high - low == pytest.approx(0.0, abs=1e-9)


def test_answers_on_the_new_skill_are_shown_before_and_after(tmp_path: Path) -> None:
    data_file(tmp_path)
    runs = [write_run(tmp_path, arm, 0) for arm in ("baseline", "hidden")]
    assert replies(read_runs(runs)) is None, "no answers were recorded"
    for run in runs:
        run.write_predictions("new_before", [outcome(row, False, "exact_match") for row in range(20)])
        run.write_predictions("new_after", [outcome(row, True, "exact_match") for row in range(20)])
    found = replies(read_runs(runs))
    assert found is not None
    assert [example.id for example in found.chosen] == [f"s{row}" for row in range(6)]
    names = [name for name, _ in found.chosen[3].outcomes]
    assert names == ["Teacher, before", "Plain fine-tuning", "CRaFT hidden"]
    assert [answer for _, answer in found.chosen[3].outcomes[1:]] == ["3", "3"]
    assert "The new skill, before and after" in Page(report(runs, tmp_path)[1]).text


def test_what_was_compared_is_said_in_words(tmp_path: Path) -> None:
    data_file(tmp_path)
    run = write_run(tmp_path, "hidden", 0)
    run.write_result({**(run.finished() or {}), "task_samples": 300, "anchors": 160})
    said = dict(facts(read_runs([run])))
    assert said["Old skill"] == "exact match on old.parquet"
    assert said["Trained on"] == "300 samples of nowhere, 12 steps of 32"
    assert said["Anchors"] == "160 for training, 50 held out"
    assert said["Scored on"] == "20 of old, 20 of new"
    assert said["Date"] == json.loads((run.path / "env.json").read_text())["started"][:10]
    run.write_config(run.config().changed({"about.old": "reading meters", "about.new": "reading clocks"}))
    said = dict(facts(read_runs([run])))
    assert (said["Old skill"], said["New skill"]) == ("reading meters", "reading clocks")
    assert "reading meters" in Page(report([run], tmp_path)[1]).text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/data/models/small", "small"),
        ("/x/teacher/checkpoints/last/model", "teacher"),
        ("/x/demo/model", "demo"),
    ],
)
def test_a_models_name_is_what_it_is_known_by(path: str, name: str) -> None:
    assert model_name(path) == name


def test_a_loss_curve_has_a_line_of_each_run_and_each_arms_mean(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path, arm, seed) for arm in ("baseline", "hidden") for seed in (0, 1)])
    drawn = str(loss_plot(runs))
    for run in runs:
        assert drawn.count(f"stroke: {run.style.color}") == 4, "two seeds, their mean, and the legend"
