"""Scores on held-out data: the teacher's, measured once for all runs that share it, and the student's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from craft_ray.config import EvalSet, EvaluationConfig, Experiment, RolloutEvalSet, ValidationConfig
from craft_ray.errors import ConfigError, DataError
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.run.folder import RunFolder
from craft_ray.run.kept import Certificate, kept_bounds
from craft_ray.run.metrics import Record
from craft_ray.run.rows import Rows
from craft_ray.run.scoring import EvalData, Score, evaluate, open_eval_set, ratio
from craft_ray.storage.files import write_atomically
from craft_ray.workers import Workers

SKILLS = ("old", "new")
SECTIONS = ("validation", "evaluation")


def eval_sets(config: Experiment, section: str) -> list[tuple[str, EvalSet]]:
    """The skills for which `validation` or `evaluation` specifies data."""
    sets: ValidationConfig | EvaluationConfig = config.validation if section == "validation" else config.evaluation
    return [(skill, eval_set) for skill, eval_set in (("old", sets.old), ("new", sets.new)) if eval_set is not None]


class HeldOut:
    """The held-out data of a run, and the teacher's scores on them.

    Args:
        teacher_weights: hash of the untouched student's weights; None in a resumed run, which no longer
            has the teacher.
    """

    def __init__(
        self,
        config: Experiment,
        model: Model,
        teacher_weights: str | None,
        folder: RunFolder,
        workers: Workers,
        features: FeatureCache,
    ) -> None:
        self._config = config
        self._model = model
        self._teacher_weights = teacher_weights
        self._folder = folder
        self._workers = workers
        self._features = features
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
                craft = self._config.craft
                if skill == "old" and craft.enabled and craft.keep is not None and score.value == 0:
                    raise DataError(
                        f"craft.keep {craft.keep}: the teacher scores 0 on {section}.old, so no part of it can be "
                        f"kept; use data that it can do, or hold L_ret to craft.epsilon_start"
                    )

    def validation(self) -> Record:
        """`old/score`, `old/ratio` (to the teacher's), and the same for `new`. A ratio to a teacher's zero is None.
        `old/bound` is the ratio's lower bound at `craft.keep_confidence`."""
        record: Record = {}
        for skill, eval_set in eval_sets(self._config, "validation"):
            before, after = self._before["validation", skill], self._student_score("validation", skill, eval_set)
            record[f"{skill}/score"] = after.value
            record[f"{skill}/ratio"] = ratio(before.metric, after.value, before.value)
            if skill == "old":
                bounds = kept_bounds(before, after, self._config.craft.keep_confidence)
                record["old/bound"] = None if bounds is None else bounds[0]
        return record

    def evaluation(self) -> dict[str, Any]:
        """Both skills before and after, for `result.json`; the predictions go into the run's folder."""
        result: dict[str, Any] = {skill: {"before": None, "after": None} for skill in SKILLS}
        for skill, eval_set in eval_sets(self._config, "evaluation"):
            before, after = self._before["evaluation", skill], self._student_score("evaluation", skill, eval_set)
            result[skill] = {
                "metric": before.metric,
                "before": before.value,
                "after": after.value,
                "ratio": ratio(before.metric, after.value, before.value),
                "samples": before.samples,
            }
            bounds = kept_bounds(before, after)
            if skill == "old" and bounds is not None:
                result[skill] |= {"ratio_low": bounds[0], "ratio_high": bounds[1]}
            for when, seen in (("before", before), ("after", after)):
                result[skill] |= {f"{name}_{when}": value for name, value in seen.details.items()}
            if self._main:
                self._folder.write_predictions(f"{skill}_after", after.records)
        return result

    def certificate(self, keep: float) -> dict[str, Any]:
        """Whether `keep` of the old skill is kept, for `result.json`: on test data, or where the config has none on the
        validation data, which the budget followed."""
        section = "evaluation" if self._config.evaluation.old is not None else "validation"
        eval_set = dict(eval_sets(self._config, section))["old"]
        before = self._before[section, "old"]
        after = self._after.get((section, "old")) or self._student_score(section, "old", eval_set)
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
            source = open_eval_set(eval_set, f"{section}.{skill}")
            self._data[section, skill] = EvalData(self._model, source, eval_set, self._features)
        return self._data[section, skill]

    def rows(self) -> Iterator[Rows]:
        """The rows of each set of held-out samples."""
        for section in SECTIONS:
            for skill, eval_set in eval_sets(self._config, section):
                data = self.data(section, skill, eval_set)
                if not isinstance(eval_set, RolloutEvalSet):
                    how = [eval_set.metric, self._model.preprocessor_fingerprint()]
                    content = data.of.fingerprint if self._main else ""
                    yield Rows(f"{section}.{skill}.data", len(data.of), content, data.prepare, how)

    def _teacher_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        data = self.data(section, skill, eval_set)
        teacher = self._teacher_weights or self._teacher_of_resumed_run()
        how = [self._model.preprocessor_fingerprint(), self._config.train.precision]
        key = json_fingerprint([teacher, data.of.fingerprint, eval_set.decisive, how])
        own = self._own_teacher_score(section, skill)
        shared = self._folder.shared / f".teacher-score-{key[:16]}.json"
        known = self._workers.gather({str(p): json.loads(p.read_text()) for p in (own, shared) if p.exists()})[0]
        if known:
            found = next(iter(known.values()))
            if found["key"] != key:
                raise ConfigError(
                    f"{section}.{skill} is not what it was when the run started: its data or settings changed, and the "
                    f"teacher can no longer be scored on them; restore them, or start a new run"
                )
            score = Score(**found["score"])
        elif self._teacher_weights is None:
            raise ConfigError(
                f"{own} is missing, and a resumed run has no teacher to score: restore the file, or start a new run"
            )
        else:
            score = evaluate(data, self._workers)
        if self._main:
            for path in (own, shared):
                if str(path) not in known:
                    write_atomically(path, json.dumps({"key": key, "score": asdict(score)}))
            if section == "evaluation":
                self._folder.write_predictions(f"{skill}_before", score.records)
        return score

    def _student_score(self, section: str, skill: str, eval_set: EvalSet) -> Score:
        score = evaluate(self.data(section, skill, eval_set), self._workers)
        self._after[section, skill] = score
        return score

    def _own_teacher_score(self, section: str, skill: str) -> Path:
        """The score that this run started with; a run can be moved and still be resumed."""
        return self._folder.disk / f"teacher_{'' if section == 'evaluation' else section + '_'}{skill}.json"

    @property
    def _weights_file(self) -> Path:
        return self._folder.disk / "teacher.json"

    def _teacher_of_resumed_run(self) -> str:
        """The teacher's hash, for a run whose model is no longer the teacher."""
        return str(json.loads(self._weights_file.read_text())["weights"])
