"""Scores on held-out data: the teacher's, measured once for all runs that share it, and the student's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from craft_ray.config import (
    EvalSet,
    EvaluationConfig,
    Experiment,
    HarnessEvalSet,
    SampleEvalSet,
    ValidationConfig,
    scores_of,
)
from craft_ray.errors import ConfigError, DataError
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.pace import Pace, Report, unreported
from craft_ray.run.folder import RunFolder
from craft_ray.run.harness_requests import asked_otherwise
from craft_ray.run.kept import Certificate, agreement, kept_bounds
from craft_ray.run.metrics import Record
from craft_ray.run.rows import Rows
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set, ratio
from craft_ray.storage.files import write_atomically
from craft_ray.workers import Workers

SECTIONS = ("validation", "evaluation")


def eval_sets(config: Experiment, section: str) -> list[tuple[str, EvalSet]]:
    """The skills for which `validation` or `evaluation` specifies data: `old`, or several by name, and `new`."""
    sets: ValidationConfig | EvaluationConfig = config.validation if section == "validation" else config.evaluation
    named = [(name, getattr(skill, section)) for name, skill in config.skills.items()]
    return [(skill, found) for skill, found in (("old", sets.old), *named, ("new", sets.new)) if found is not None]


def key_of(config: Experiment, section: str, skill: str) -> str:
    """The config's key of a held-out set."""
    return f"skills.{skill}.{section}" if skill in config.skills else f"{section}.{skill}"


def rows_of(data: EvalData, key: str, main: bool = True) -> Rows:
    """The rows of a set of held-out samples, each to be prepared as its score needs it.

    Args:
        key: the config's key of the set.
        main: whether this is the first worker.
    """
    how = [data.eval_set.decisive, data.model.sample_fingerprint()]
    content = data.of.fingerprint if main else ""
    return Rows(f"{key}.data", len(data.of), content, data.prepare, data.source.place, how, data.model.threaded)


def worst(scores: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Of several old skills, the scores of the one with the smallest ratio to the teacher's, and its name as `skill`:
    they represent the old skill where there is room for one. None if no skill was scored."""
    known = {name: found for name, found in scores.items() if found["ratio"] is not None}
    if not known:
        return None
    name = min(known, key=lambda name: known[name]["ratio"])
    return {**known[name], "skill": name}


class HeldOut:
    """The held-out data of a run, and the teacher's scores on them.

    Args:
        teacher_weights: hash of the untouched student's weights; None in a resumed run, which no longer
            has the teacher.
        report: receives how far a score that takes long is.
        kept_parts: what part of which skill must be kept; by default what the config asks of a run that trains.
    """

    def __init__(
        self,
        config: Experiment,
        model: Model,
        teacher_weights: str | None,
        folder: RunFolder,
        workers: Workers,
        features: FeatureCache,
        report: Report = unreported,
        kept_parts: Mapping[str | None, float] | None = None,
    ) -> None:
        self._report = report if workers.rank == 0 else unreported
        self._config = config
        self._model = model
        self._teacher_weights = teacher_weights
        self._folder = folder
        self._workers = workers
        self._features = features
        self._kept_parts = config.kept_parts() if kept_parts is None else kept_parts
        self._data: dict[tuple[str, str], EvalData] = {}
        self._before: dict[tuple[str, str], Score] = {}
        self._after: dict[tuple[str, str], Score] = {}
        """The student's last scores."""
        self._main = workers.rank == 0
        if self._main and teacher_weights is not None:
            write_atomically(self._weights_file, json.dumps({"weights": teacher_weights}))
            for score in folder.disk.glob("teacher_*.json"):
                score.unlink()

    def score_teacher(self) -> None:
        """Score the teacher on every held-out set, or read what another run of the same teacher has measured.

        Raises:
            DataError: a part of its score is to be kept, and it is zero.
        """
        for section in SECTIONS:
            for skill, eval_set in eval_sets(self._config, section):
                score = self._before[section, skill] = self._teacher_score(section, skill, eval_set)
                name = None if skill == "old" else skill
                keep = self._kept_parts.get(name)
                if keep is not None and score.value == 0:
                    where = key_of(self._config, section, skill)
                    raise DataError(
                        f"{self._config.keep_key(name)} {keep}: the teacher scores 0 on {where}, so no part of it can "
                        f"be kept; use data that it can do, or hold L_ret to an epsilon_start"
                    )

    def validation(self) -> Record:
        """`old/score`, `old/ratio` (to the teacher's), and the same for `new`. A ratio to a teacher's zero is None.
        `old/bound` is the ratio's lower bound at `craft.keep_confidence`. Of several old skills each has its own
        (`skills/NAME/score`), and `old` is the one with the smallest ratio."""
        record: Record = {}
        skills: dict[str, dict[str, Any]] = {}
        for skill, eval_set in eval_sets(self._config, "validation"):
            before, after = self._before["validation", skill], self._student_score("validation", skill, eval_set)
            found = {"score": after.value, "ratio": ratio(before.metric, after.value, before.value)}
            if skill != "new":
                bounds = kept_bounds(before, after, self._config.craft.keep_confidence)
                found["bound"] = None if bounds is None else bounds[0]
            if skill in self._config.skills:
                skills[skill] = found
            prefix = scores_of(skill) if skill in self._config.skills else skill
            record |= {f"{prefix}/{name}": value for name, value in found.items()}
        weakest = worst(skills) or {}
        return record | {f"old/{name}": value for name, value in weakest.items() if name != "skill"}

    def evaluation(self) -> dict[str, Any]:
        """Both skills before and after, for `result.json`; the predictions go into the run's folder. With several old
        skills, `skills` has each, and `old` is the one with the smallest ratio."""
        result: dict[str, Any] = {skill: {"before": None, "after": None} for skill in ("old", "new")}
        skills: dict[str, dict[str, Any]] = {}
        for skill, eval_set in eval_sets(self._config, "evaluation"):
            before, after = self._before["evaluation", skill], self._student_score("evaluation", skill, eval_set)
            of = skills if skill in self._config.skills else result
            of[skill] = {
                "metric": before.metric,
                "before": before.value,
                "after": after.value,
                "ratio": ratio(before.metric, after.value, before.value),
                "samples": before.samples,
            }
            bounds = kept_bounds(before, after)
            if skill != "new" and bounds is not None:
                of[skill] |= {"ratio_low": bounds[0], "ratio_high": bounds[1]}
            if skill != "new" and (agreed := agreement(before, after)) is not None:
                of[skill]["agreement"] = agreed
            for when, seen in (("before", before), ("after", after)):
                of[skill] |= {f"{name}_{when}": value for name, value in seen.details.items()}
            if self._main:
                self._folder.write_predictions(f"{skill}_after", after.records)
        if self._config.skills:
            result["skills"] = skills
            result["old"] = worst(skills) or result["old"]
        return result

    def forget_student(self) -> None:
        """Score the student again when its scores are next asked for: its weights have changed without a validation."""
        self._after.clear()

    def certificates(self) -> dict[str | None, dict[str, Any]]:
        """Whether the stated part of each old skill is kept, for `result.json`; none in plain fine-tuning."""
        return {skill: self._certificate(skill, keep) for skill, keep in self._kept_parts.items()}

    def _certificate(self, name: str | None, keep: float) -> dict[str, Any]:
        """On test data, or if the config has none, on the validation data, which the budget followed."""
        skill = "old" if name is None else name
        section = "evaluation" if skill in dict(eval_sets(self._config, "evaluation")) else "validation"
        eval_set = dict(eval_sets(self._config, section))[skill]
        before = self._before[section, skill]
        after = self._after.get((section, skill)) or self._student_score(section, skill, eval_set)
        kept, bounds = ratio(before.metric, after.value, before.value), kept_bounds(before, after)
        assert kept is not None, "refused by score_teacher"
        assert bounds is not None
        certificate = Certificate(keep, kept, *bounds, after.samples)
        return {"certificate": {**certificate.as_dict(), "judged_on": section}, "feasible": kept >= keep}

    def data(self, section: str, skill: str, eval_set: EvalSet) -> EvalData:
        """A held-out set, opened once.

        Raises:
            ConfigError: there is no data, or the model cannot read it or act in it.
        """
        if (section, skill) not in self._data:
            source = open_eval_set(eval_set, key_of(self._config, section, skill))
            self._data[section, skill] = EvalData(self._model, source, eval_set, self._features)
        return self._data[section, skill]

    def samples(self) -> Iterator[tuple[str, str, EvalData]]:
        """Section, skill and data of each set of held-out samples."""
        for section in SECTIONS:
            for skill, eval_set in eval_sets(self._config, section):
                if isinstance(eval_set, SampleEvalSet):
                    yield section, skill, self.data(section, skill, eval_set)

    def rows(self) -> Iterator[Rows]:
        """The rows of each set of held-out samples."""
        for section in SECTIONS:
            for skill, eval_set in eval_sets(self._config, section):
                data = self.data(section, skill, eval_set)
                if isinstance(eval_set, SampleEvalSet):
                    yield rows_of(data, key_of(self._config, section, skill), self._main)

    def _teacher_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        data = self.data(section, skill, eval_set)
        teacher = self._teacher_weights or self._teacher_of_resumed_run()
        how = [self._model.preprocessor_fingerprint(), self._config.train.precision]
        if data.judge is not None and data.judge.identity:
            how.append(data.judge.identity)
        if isinstance(eval_set, HarnessEvalSet):
            how += asked_otherwise(self._model)
        key = json_fingerprint([teacher, data.of.fingerprint, eval_set.decisive, how])
        own = self._own_teacher_score(section, skill)
        shared = self._folder.shared / f".teacher-score-{key[:16]}.json"
        known = self._workers.gather({str(p): json.loads(p.read_text()) for p in (own, shared) if p.exists()})[0]
        if known:
            found = next(iter(known.values()))
            if found["key"] != key:
                raise ConfigError(
                    f"{key_of(self._config, section, skill)} is not what it was when the run started: its data or "
                    f"settings changed, and the teacher can no longer be scored on them; restore them, or start a new "
                    f"run"
                )
            score = Score(**found["score"])
        elif self._teacher_weights is None:
            raise ConfigError(
                f"{own} is missing, and a resumed run has no teacher to score: restore the file, or start a new run"
            )
        else:
            score = self._scored(data, f"scoring the teacher on {key_of(self._config, section, skill)}")
        if self._main:
            for path in (own, shared):
                if str(path) not in known:
                    write_atomically(path, json.dumps({"key": key, "score": asdict(score)}))
            if section == "evaluation":
                self._folder.write_predictions(f"{skill}_before", score.records)
        return score

    def _student_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        data = self.data(section, skill, eval_set)
        score = self._after[section, skill] = self._scored(data, f"scoring on {key_of(self._config, section, skill)}")
        return score

    def _scored(self, data: EvalData, what: str) -> Score:
        return evaluate(data, self._workers, Pace(what, len(data.of), self._report))

    def _own_teacher_score(self, section: str, skill: str) -> Path:
        """The score that this run started with; a run can be moved and still be resumed."""
        if skill in self._config.skills:
            return self._folder.disk / f"teacher_skills_{skill}_{section}.json"
        return self._folder.disk / f"teacher_{'' if section == 'evaluation' else section + '_'}{skill}.json"

    @property
    def _weights_file(self) -> Path:
        return self._folder.disk / "teacher.json"

    def _teacher_of_resumed_run(self) -> str:
        """The teacher's hash, for a run whose model is no longer the teacher."""
        return str(json.loads(self._weights_file.read_text())["weights"])
