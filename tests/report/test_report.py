"""The report: its numbers against hand-computed ones, and a page that stands alone, whatever a run lacks."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError
from craft_ray.report.examples import examples
from craft_ray.report.html import write_report
from craft_ray.report.runs import read_runs
from craft_ray.report.summary import summarize
from craft_ray.report.thin import curve
from craft_ray.run.folder import RunFolder
from craft_ray.run.scoring import ratio

STEPS = 12
EVIL = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


# -- run folders, as a run leaves them


def data_file(folder: Path, rows: int = 20) -> Path:
    """Held-out samples with a picture, a prompt that must be escaped, and a digit as the answer."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, format="PNG")
    path = folder / "old.parquet"
    table = {
        "id": [f"s{row}" for row in range(rows)],
        "image": [buffer.getvalue()] * rows,
        "prompt": [f"{EVIL} {row}" for row in range(rows)],
        "response": [str(row % 10) for row in range(rows)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def config_of(
    arm: str, seed: int, folder: Path, metric: str = "exact_match", mode: str | None = None, **craft: Any
) -> Experiment:
    """The config of a run. An arm with a `mode` is a variant."""
    eval_set: dict[str, Any] = {
        "metric": metric,
        "data": {
            "path": str(folder / "old.parquet"),
            "columns": {"id": "id", "image": "image", "prompt": "prompt", "response": "response"},
        },
    }
    if metric == "success":
        eval_set = {"metric": metric, "rollout": {"env": "metaworld", "task": "drawer-close-v3"}}
    settings = {"enabled": arm != "baseline", "anchor_cache_dir": str(folder / "cache"), "epsilon_start": 0.05} | craft
    if arm != "baseline":
        settings["retention_mode"] = mode or arm
    return Experiment.model_validate(
        {
            "name": "made-up",
            "variant": mode and arm,
            "seed": seed,
            "output_dir": str(folder),
            "model": {"path": "nowhere"},
            "task": {"path": "nowhere", "columns": {"response": "response"}},
            "craft": settings,
            "train": {"steps": STEPS},
            "evaluation": {"old": eval_set, "new": eval_set},
        }
    )


def log_of(config: Experiment) -> list[dict[str, Any]]:
    """A log with the gaps of a real one: K, no retention in plain fine-tuning, and a first cosine that is NaN."""
    records = []
    for step in range(1, STEPS + 1):
        retained = config.craft.enabled and (step - 1) % config.craft.retention_freq == 0
        records.append(
            {
                "step": step,
                "train/loss": 1 / step,
                "train/grad_norm": 1.0,
                "train/lr": 1e-4,
                "craft/retention_loss": 0.2 / step if retained else None,
                "craft/lambda": 1.0 + step if config.craft.enabled else None,
                "craft/epsilon": config.craft.epsilon_start if config.craft.enabled else None,
                "craft/grad_dot": 0.1 if retained else None,
                "craft/grad_cos": math.sin(step) if retained and step > 1 else None,
                "craft/conflict": math.sin(step) < -0.1 if retained else None,
                "perf/step_s": 0.1,
                "perf/data_s": 0.0,
            }
        )
    return records


def write_run(
    folder: Path,
    arm: str,
    seed: int,
    old: tuple[float, float] | None = (0.8, 0.4),
    new: tuple[float, float] | None = (0.1, 0.9),
    loss: float | None = 0.04,
    metric: str = "exact_match",
    predictions: bool = True,
    mode: str | None = None,
    **craft: Any,
) -> RunFolder:
    """A finished run with the scores `(before, after)` and the held-out retention loss that are given."""
    config = config_of(arm, seed, folder, metric, mode, **craft)
    run = RunFolder(folder / f"{config.name}-{arm}-seed{seed}")
    run.begin(config, ["craft-ray", "train"])
    (run.path / "teacher.json").write_text('{"weights": "feedc0de"}')
    run.append_metrics(log_of(config))
    result: dict[str, Any] = {"name": config.name, "arm": arm, "seed": seed, "steps": STEPS, "seconds": 1.5}
    for skill, scores in (("old", old), ("new", new)):
        result[skill] = {"before": None, "after": None}
        if scores is not None:
            before, after = scores
            part = ratio(metric, after, before)
            result[skill] = {"metric": metric, "before": before, "after": after, "ratio": part, "samples": 20}
    if loss is None:
        result |= {"retention_loss": None, "epsilon": None, "feasible": None}
    else:
        epsilon = config.craft.epsilon_final
        result |= {
            "retention_mode": config.craft.retention_mode, "retention_loss": loss, "epsilon": epsilon,
            "violation": max(0.0, loss / epsilon - 1), "feasible": loss <= epsilon, "heldout_anchors": 50,
            "lambda": None if arm == "baseline" else 2.5, "cache": "cafe",
        }  # fmt: skip
    run.write_result(result)
    if predictions and old is not None:
        run.write_predictions("old_before", [outcome(row, True, metric) for row in range(20)])
        run.write_predictions("old_after", [outcome(row, arm != "baseline" or row < 3, metric) for row in range(20)])
    return run


def outcome(row: int, right: bool, metric: str) -> dict[str, Any]:
    if metric == "perplexity":
        return {"id": f"s{row}", "nll": 2.0 if right else 6.0 + row, "tokens": 2}
    answer = str(row % 10)
    return {
        "id": f"s{row}", "prompt": f"{EVIL} {row}", "response": answer,
        "prediction": answer if right else EVIL, "correct": right,
    }  # fmt: skip


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Plain fine-tuning and both CRaFT arms on seeds 0, 1, 2. Shared: do not write into it."""
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


def report(runs: Sequence[RunFolder], folder: Path, title: str = "A title") -> tuple[dict[str, Any], str]:
    """The report's numbers and its page, read back from the disk."""
    target = folder / "report"
    told = write_report(runs, target, title=title, command="craft-ray compare run.yaml")
    assert json.loads((target / "result.json").read_text()) == told
    return told, (target / "report.html").read_text()


@pytest.fixture(scope="module")
def three_arms_report(
    three_arms: list[RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    return report(three_arms, tmp_path_factory.mktemp("report"), title=EVIL)


class Page(HTMLParser):
    """What a page refers to and says: attributes that load or link, elements, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.shown: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


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
    told, text = report([plain, hidden], tmp_path)
    assert told["summary"]["baseline"]["old_ratio"] == 0.25
    assert told["summary"]["hidden"]["old_ratio"] == 0.8
    assert told["summary"]["hidden"]["new_ratio"] == 0.75
    page = Page(text)
    assert "took the old skill's perplexity from 2.00 to 2.50" in page.text
    assert "inverse perplexity" in page.text
    assert "12.5 nats per token" in page.text, "the sample that differs most has (6 + 19) / 2 nats a token"
    assert page.text.index("12.5 nats per token") < page.text.index("12.0 nats per token")


def test_no_plain_run_no_new_ratio(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path, "hidden", 0), write_run(tmp_path, "hidden", 1)])
    plain = read_runs([write_run(tmp_path, "baseline", 0)])
    assert summarize([run.result for run in runs])["hidden"]["new_ratio"] is None
    summary = summarize([run.result for run in runs + plain])
    # seed 1 has no plain run, and a mean over seed 0 would stand as one over both
    assert summary["hidden"]["new_ratio"] is None
    assert summary["hidden"]["old_ratio"] == 0.5


def test_teacher_without_the_skill(tmp_path: Path) -> None:
    data_file(tmp_path)
    run = write_run(tmp_path, "hidden", 0, old=(0.0, 0.3))
    told, text = report([run], tmp_path)
    assert told["summary"]["hidden"]["old_ratio"] is None
    assert "scores 30.0 % on the old skill, the teacher 0 %" in Page(text).text


# -- the page


def test_page_says_the_numbers_of_the_result(three_arms_report: tuple[dict[str, Any], str]) -> None:
    told, text = three_arms_report
    page = Page(text)
    for numbers in told["summary"].values():
        for key in ("old_after", "old_ratio", "new_after", "new_ratio"):
            assert f"{100 * numbers[key]:.1f} %" in page.text
            low, high = numbers[f"{key}_interval"]
            assert key == "new_ratio" or f"[{100 * low:.1f}, {100 * high:.1f}] %" in page.text
        assert f"{numbers['feasible']} of 3" in page.text
    assert "CRaFT hidden kept 95.0 % of the old skill" in page.text
    assert "budget met on held-out anchors in 2 of 3 runs" in page.text
    assert len(told["runs"]) == 9
    assert all(Path(run["path"]).name in page.text for run in told["runs"])
    assert told["command"] in page.text
    assert told["environment"][0]["packages"]["torch"] in page.text
    assert "feedc0de" in page.text
    assert "cafe" in page.text
    assert "craft.epsilon_start" in page.text


def test_page_stands_alone(three_arms_report: tuple[dict[str, Any], str]) -> None:
    text = three_arms_report[1]
    page = Page(text)
    assert page.references, "it has pictures"
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


def test_what_users_give_is_escaped(three_arms_report: tuple[dict[str, Any], str]) -> None:
    page = Page(three_arms_report[1])
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 10, "title, prompts and predictions are shown as they are"


def test_samples_that_are_gone_or_changed_are_told(tmp_path: Path) -> None:
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
        (without_evaluation, "made without an evaluation"),
        (without_anchors, "no retention budget was judged"),
        (with_nothing, "trained for 12 steps, without an evaluation"),
        (with_gaps, "cosine of the gradients"),
        (without_metrics, "budget met on held-out anchors in 1 of 1 run."),
        (without_old_skill, "scores 90.0 % on the new skill"),
        (without_environment, "The environment was not recorded"),
    ],
)
def test_single_run_with_pieces_missing(make: Callable[[Path], RunFolder], says: str, tmp_path: Path) -> None:
    told, text = report([make(tmp_path)], tmp_path)
    page = Page(text)
    assert says in page.text
    assert "One seed" in page.text or "without an evaluation" in page.text
    assert all(numbers["old_ratio_interval"] is None for numbers in told["summary"].values())
    assert "None" not in page.text.replace("null", "")


def test_budget_judged_on_training_anchors_is_called_so(tmp_path: Path) -> None:
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


# -- what does not compare is refused


def test_runs_that_do_not_compare_are_refused(tmp_path: Path) -> None:
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


def test_unfinished_runs_and_own_folders_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, "hidden", 0)
    with pytest.raises(ConfigError, match="run directory"):
        write_report([run], run.path, title="", command="")
    run.result.unlink()
    with pytest.raises(ConfigError, match="--resume"):
        report([run], tmp_path)
    with pytest.raises(ConfigError, match="at least one run"):
        report([], tmp_path)
