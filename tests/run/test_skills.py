"""Runs that hold several old skills: anchors in one cache, a budget and a multiplier each, and what is refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from craft_pipelines.anchors import build
from craft_pipelines.compare import arm_config
from safetensors.torch import load_file

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, ObjectiveConfig
from craft_ray.config.arms import penalty
from craft_ray.errors import CacheRefused, ConfigError, DataError
from craft_ray.models import load_model
from craft_ray.report.html import write_report
from craft_ray.report.wording import number
from craft_ray.retention.constraints import Constraints, open_constraints
from craft_ray.run.folder import RunFolder
from craft_ray.run.judgement import judged
from craft_ray.run.kept import anchors_in_words
from craft_ray.run.metrics import console_line, result_lines, validation_line
from craft_ray.run.objective import objective_of
from craft_ray.run.observers import NullObserver
from craft_ray.run.training import train, training
from craft_ray.workers import OneWorker
from tests.support.experiments import ANSWERED, COLUMNS, Digits
from tests.support.runs import trained


def source(digits: Digits, rows: slice, folder: Path, name: str) -> Path:
    """Some of the anchors as a file of their own."""
    path = folder / f"{name}.parquet"
    pq.write_table(pq.read_table(digits.data / "anchors.parquet")[rows], path)
    return path


def scored(digits: Digits, split: str) -> dict[str, Any]:
    data = {"path": str(digits.data / f"old_{split}.parquet"), "columns": ANSWERED, "limit": 24}
    return {"data": data, "metric": "perplexity"}


@pytest.fixture(scope="module")
def folder(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the anchors of two skills and their cache. Read only."""
    folder = tmp_path_factory.mktemp("skills")
    source(digits, slice(0, 30), folder, "near")
    source(digits, slice(30, 40), folder, "far")
    build(two(digits, folder), say=lambda _: None)
    return folder


def two(digits: Digits, folder: Path, changes: dict[str, Any] | None = None) -> Experiment:
    """`near` has three times the anchors of `far`, in the cache and in a batch."""
    skills = {
        name: {
            "anchors": {"path": str(folder / f"{name}.parquet"), "columns": COLUMNS},
            "share": share,
            "evaluation": scored(digits, "test"),
            "validation": scored(digits, "val"),
        }
        for name, share in (("near", 3.0), ("far", 1.0))
    }
    own: dict[str, Any] = {"anchors.source": None, "skills": skills, "skills.far.epsilon_start": 0.0005}
    return digits.experiment(folder, {**own, **(changes or {})})


def opened(config: Experiment) -> Constraints:
    model = load_model(config.model, config.train.precision)
    return open_constraints(config, model, model.weights_fingerprint(), OneWorker())


def test_one_cache_holds_the_anchors_of_every_skill(digits: Digits, folder: Path) -> None:
    manifest = read_manifest(folder / "anchors")
    assert manifest.identity.skills == ("near", "far")
    anchors = open_anchors(folder / "anchors", manifest)
    assert [anchors.skill(row) for row in range(len(anchors))] == ["near"] * 30 + ["far"] * 10
    assert anchors.id(0).startswith("near/")
    assert anchors.id(39).startswith("far/")
    shard = pq.read_table(folder / "anchors" / "shards" / manifest.shards[0].name)
    assert shard["skill"].type == pa.string()


def test_a_batch_has_anchors_of_each_skill_by_its_share_and_none_that_is_held_out(digits: Digits, folder: Path) -> None:
    constraints = opened(two(digits, folder, {"train.accumulate": 2}))
    near, far = constraints.held
    assert set(near.train_rows) | set(near.heldout_rows) == set(range(30))
    assert set(far.train_rows) | set(far.heldout_rows) == set(range(30, 40))
    for step in range(5):
        assert set(near.chosen(step)) <= set(near.train_rows)
        assert set(far.chosen(step)) <= set(far.train_rows)
        batches = constraints.batches(step)
        assert batches is not None
        assert [batch.count for batch in batches] == [4, 4]
        assert sum(batch.counts_S for batch in batches).tolist() == [6.0, 2.0]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def held(digits: Digits, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run. Read only."""
    config = two(digits, folder, {"validation.every": 2, "craft.lambda_lr": 0.3})
    return trained(config, tmp_path_factory.mktemp("held") / "run")


def test_each_skill_has_a_loss_a_budget_and_a_multiplier_of_its_own(held: RunFolder) -> None:
    records = held.read_metrics()
    assert {record["skills/near/epsilon"] for record in records} == {0.001}
    assert {record["skills/far/epsilon"] for record in records} == {0.0005}
    last = records[-1]
    assert last["craft/lambda"] == pytest.approx(last["skills/near/lambda"] + last["skills/far/lambda"])
    near, far = ([record[f"skills/{skill}/lambda"] for record in records] for skill in ("near", "far"))
    assert near != far
    low, high = sorted((last["skills/near/retention_loss"], last["skills/far/retention_loss"]))
    assert low <= last["craft/retention_loss"] <= high
    assert "near: L_ret=" in console_line(records, 6, "hidden")


def test_the_result_judges_each_skill_and_all_together(held: RunFolder) -> None:
    result = held.finished()
    assert result is not None
    near, far = result["skills"]["near"], result["skills"]["far"]
    for skill in (near, far):
        assert skill["feasible"] == (skill["retention_loss"] <= skill["epsilon"])
        assert skill["slackness"] == pytest.approx(skill["lambda"] * (skill["retention_loss"] - skill["epsilon"]))
        assert skill["metric"] == "perplexity"
        assert skill["anchor_agreement"]["anchors"] == skill["heldout_anchors"]
    assert result["anchor_agreement"] in (near["anchor_agreement"], far["anchor_agreement"])
    assert result["anchor_agreement"]["at_most_lost"] == max(
        skill["anchor_agreement"]["at_most_lost"] for skill in (near, far)
    )
    assert result["feasible"] == (near["feasible"] and far["feasible"])
    worst = max((near, far), key=lambda skill: skill["retention_loss"] / skill["epsilon"])
    assert (result["retention_loss"], result["epsilon"]) == (worst["retention_loss"], worst["epsilon"])
    assert result["old"]["ratio"] == min(near["ratio"], far["ratio"])
    assert result["old"]["skill"] in ("near", "far")
    assert result["stationarity"] >= 0
    lines = "\n".join(result_lines(result))
    assert "near: retention loss" in lines
    assert "far: retention loss" in lines
    assert f"far: {anchors_in_words(far['anchor_agreement'])}" in lines
    validation = held.read_validation()[-1]
    assert validation["old/ratio"] == min(validation["skills/near/ratio"], validation["skills/far/ratio"])
    assert "near " in validation_line(validation, 6)


def test_a_run_of_several_skills_resumes_bit_for_bit(
    digits: Digits, folder: Path, held: RunFolder, tmp_path: Path
) -> None:
    cut = RunFolder(tmp_path / "cut")
    config = held.config()
    cut.begin(config, ["test"])
    with closing(training(config, cut, OneWorker(), NullObserver())) as validations:
        next(validations)
    train(config, cut, OneWorker(), NullObserver())
    own, other = (load_file(run.checkpoints / "last/model/model.safetensors") for run in (held, cut))
    assert all((own[name] == other[name]).all() for name in own)
    keys = [key for key in held.read_metrics()[0] if not key.startswith("perf/")]
    assert [[r[key] for key in keys] for r in cut.read_metrics()] == [
        [r[key] for key in keys] for r in held.read_metrics()
    ]


@pytest.mark.parametrize("mode", ["hidden", "token_ce"])
def test_one_named_skill_is_held_like_one_without_a_name(digits: Digits, tmp_path: Path, mode: str) -> None:
    """The same anchors in the same batches; only the way in which they are added up differs."""
    path = source(digits, slice(0, 32), tmp_path, "all")
    common = {"craft.retention_mode": mode, "craft.epsilon_start": 0.05, "train.steps": 4}
    alone = digits.experiment(tmp_path, {"anchors.source": {"path": str(path), "columns": COLUMNS}, **common})
    named = {"anchors.source": None, "skills": {"all": {"anchors": {"path": str(path), "columns": COLUMNS}}}}
    together = alone.changed({**named, "craft.anchor_cache_dir": str(tmp_path / "named")})
    found = []
    for place, config in enumerate((alone, together)):
        build(config, say=lambda _: None)
        # An id that starts with the skill's name is drawn into another part.
        config = config.changed({"craft.anchor_holdout": 0.0})
        found.append(trained(config, tmp_path / f"run{place}").read_metrics())
    for one, several in zip(*found, strict=True):
        for key in ("train/loss", "craft/retention_loss", "craft/lambda", "craft/grad_cos", "train/grad_norm"):
            expected = one[key] if one[key] is None else pytest.approx(one[key], rel=2e-3, abs=1e-6)
            assert several[key] == expected, key


def test_each_budget_follows_what_is_kept_of_its_own_skill(digits: Digits, folder: Path, tmp_path: Path) -> None:
    changes = {"validation.every": 2, "skills.near.keep": 0.9, "skills.near.epsilon_start": 0.001}
    run = trained(two(digits, folder, changes), tmp_path / "run")
    records, validations = run.read_metrics(), run.read_validation()
    assert len({record["skills/near/epsilon"] for record in records}) == 3
    assert {record["skills/far/epsilon"] for record in records} == {0.0005}
    assert records[2]["skills/near/epsilon"] == validations[0]["skills/near/next_epsilon"]
    result = run.finished()
    assert result is not None
    assert result["certificate"]["keep"] == result["skills"]["near"]["certificate"]["keep"] == 0.9
    assert "certificate" not in result["skills"]["far"]
    assert result["feasible"] == (result["skills"]["near"]["feasible"] and result["skills"]["far"]["feasible"])


def test_all_skills_together_are_judged_by_those_that_are_held() -> None:
    """Of a skill with a fixed multiplier nothing is asked, wherever it ends."""

    def found(multiplier: str | None, feasible: bool, loss: float) -> dict[str, Any]:
        return {"multiplier": multiplier, "feasible": feasible, "retention_loss": loss, "epsilon": 1.0}

    target = {"keep": 0.9, "kept": 0.95}
    losses = {"fixed": found("fixed", False, 9.0), "kept": found("adaptive", False, 2.0)}
    for met in (True, False):
        kept = {"kept": {"certificate": target, "feasible": met}}
        together = judged(losses, kept, {"skills": {}})
        assert (together["multiplier"], together["feasible"]) == ("adaptive", met)
        assert together["retention_loss"] == 9.0
    for multiplier in ("fixed", None):
        both = {name: found(multiplier, name == "a", 1.0) for name in "ab"}
        together = judged(both, {}, {"skills": {}})
        assert (together["multiplier"], together["feasible"]) == (multiplier, False)


def test_skills_alone_are_validated_after_the_last_step(digits: Digits, folder: Path, tmp_path: Path) -> None:
    run = trained(two(digits, folder), tmp_path / "run")
    (record,) = run.read_validation()
    assert record["step"] == 6
    assert record["skills/near/ratio"] > 0


def test_a_column_says_which_skill_an_anchor_belongs_to(digits: Digits, tmp_path: Path) -> None:
    table = pq.read_table(digits.data / "anchors.parquet")[:30]
    path = tmp_path / "both.parquet"
    pq.write_table(table.append_column("kind", pa.array(["near", "far", "near"] * 10)), path)
    data = {"path": str(path), "columns": {**COLUMNS, "skill": "kind"}}
    config = digits.experiment(tmp_path, {"anchors.source": data, "skills": {"near": {}, "far": {}}})
    build(config, say=lambda _: None)
    near, far = opened(config).held
    assert len(near.train_rows + near.heldout_rows) == 20
    assert len(far.train_rows + far.heldout_rows) == 10
    with pytest.raises(DataError, match=r"row 1 \(id old-0001\): the anchor belongs to the skill 'far', .* near"):
        build(
            digits.experiment(tmp_path / "less", {"anchors.source": data, "skills": {"near": {}}}), say=lambda _: None
        )


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"skills": {"a": {}}}, r"no column says which is whose: set anchors\.source\.columns\.skill"),
    ({"anchors.source": None}, r"anchors\.source is missing"),
    ({"anchors.source.columns.skill": "kind"}, r"anchors\.source\.columns\.skill is 'kind', but .* no section skills"),
    ({"anchors.source": None, "skills": {"a": {}}}, r"skills\.a has no anchors"),
    ({"skills": {"a": {"anchors": {"path": "x.jsonl"}}}}, r"anchors\.source and skills\.a\.anchors are both specified"),
    ({"skills": {"old": {}}}, "'old' is what scores of a run are called"),
    ({"skills": {"A b": {}}}, "'A b' is not a name of a skill"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSALS)
def test_anchors_come_from_one_place(digits: Digits, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        digits.experiment(tmp_path, changes)


def test_what_several_skills_cannot_have_is_refused(digits: Digits, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\.old scores one old skill, .* move it to skills\.near\.val"):
        two(digits, folder, {"validation.old": scored(digits, "val")})
    with pytest.raises(ConfigError, match=r"skills\.far has no anchor in a batch of craft\.anchor_batch_size 8"):
        two(digits, folder, {"skills.near.share": 1000.0})
    with pytest.raises(ConfigError, match=r"skills\.far\.keep 0\.9 is measured on .*: add skills\.far\.validation"):
        two(digits, folder, {"validation.every": 2, "skills.far.keep": 0.9, "skills.far.validation": None})


def test_a_cache_without_the_names_of_skills_is_refused(digits: Digits, folder: Path, tmp_path: Path) -> None:
    build(digits.experiment(tmp_path), say=lambda _: None)
    with pytest.raises(CacheRefused, match="holds skills none, this run asks for near, far"):
        opened(two(digits, tmp_path))
    # The other way round, all anchors of a cache are of one skill.
    alone = opened(digits.experiment(folder))
    assert len(alone.held[0].train_rows + alone.held[0].heldout_rows) == 40


def test_a_report_has_a_row_for_each_skill(held: RunFolder, tmp_path: Path) -> None:
    write_report([held], tmp_path / "report", title="Two skills", command="craft-ray report")
    page = (tmp_path / "report" / "report.html").read_text()
    result = held.finished()
    assert result is not None
    rows = page[page.index("Each old skill") : page.index("Elsewhere in this report")]
    for name, skill in result["skills"].items():
        assert f"<td>{name}</td>" in rows
        assert number(skill["retention_loss"]) in rows
        assert number(skill["lambda"]) in rows
    assert "retention loss of each skill over its budget" in page


def test_skills_are_metrics_of_an_objective(digits: Digits, folder: Path) -> None:
    def judged_by(**objective: Any) -> ObjectiveConfig:
        return objective_of(two(digits, folder, {"objective": objective}))

    bounds = {"skills/near/ratio": ">= 0.9", "skills/far/violation": "<= 0"}
    assert judged_by(minimize="train/loss", subject_to=bounds).subject_to == bounds
    assert judged_by(maximize="old/ratio").maximize == "old/ratio"
    with pytest.raises(ConfigError, match=r"'skills/middle/ratio' is not measured: choose among .* skills/near/ratio"):
        judged_by(maximize="skills/middle/ratio")
    with pytest.raises(ConfigError, match=r"skills/far/score is a perplexity, .* or use skills/far/ratio"):
        judged_by(maximize="skills/far/score")


def test_arms_in_another_unit_leave_the_budgets_of_skills_behind(digits: Digits, folder: Path, tmp_path: Path) -> None:
    changes = {
        "compare.token_ce": {"epsilon_start": 0.3}, "validation.every": 2, "skills.near.keep": 0.9,
        "compare.arms": ["baseline", "token_ce", "hidden"],
    }  # fmt: skip
    config = two(digits, folder, changes)
    runs = {arm: arm_config(config, arm, 0, tmp_path, config.compare.chosen) for arm in config.compare.chosen}
    assert [runs[arm].skills["far"].epsilon_start for arm in ("hidden", "token_ce")] == [0.0005, None]
    for arm in ("hidden", "token_ce"):
        assert runs[arm].skills["near"].validation is not None, "the budget follows it"
        assert runs[arm].skills["far"].validation is None
    assert runs["baseline"].skills["near"].validation is None


def test_a_penalty_is_not_moved_by_the_targets_of_skills(digits: Digits, folder: Path, tmp_path: Path) -> None:
    changes = {
        "validation.every": 2, "skills.near.keep": 0.9, "compare.variants": {"fixed": penalty("hidden")},
        "compare.arms": ["hidden", "fixed"],
    }  # fmt: skip
    config = two(digits, folder, changes)
    runs = {arm: arm_config(config, arm, 0, tmp_path, config.compare.chosen) for arm in config.compare.chosen}
    assert [runs[arm].kept_parts() for arm in ("hidden", "fixed")] == [{"near": 0.9}, {}]
