"""Which validation of a run is the best so far, by `train.keep_best`, and whether the run still improves.

Both follow from the validations that the run has written down, so a resumed run knows them without a state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from craft_ray.config import Experiment
from craft_ray.run.metrics import Record
from craft_ray.run.objective import Verdict, check_objective, judge

KEY = "train.keep_best"


class BestValidation:
    """The best of the validations that it was shown; among equals the first. Without `train.keep_best` there is none.

    Raises:
        ConfigError: a metric is not measured in validations.
    """

    def __init__(self, config: Experiment) -> None:
        self._objective, self._patience = config.train.keep_best, config.train.patience
        self._every, self._steps = config.validation.every, config.train.steps
        self._verdict: Verdict | None = None
        self._waited = 0
        self.step: int | None = None
        """The steps done at the best validation."""
        if self._objective is not None:
            check_objective(self._objective, config, KEY, of_steps=False)

    def judges(self, step: int) -> bool:
        """Whether the validation after this step is judged, so that a checkpoint has to be written before it."""
        return self._objective is not None and step % self._every == 0

    def observe(self, records: Iterable[Record]) -> None:
        """Judge validations in their order.

        Raises:
            DataError: a metric has no value.
        """
        for record in records if self._objective is not None else ():
            assert self._objective is not None
            verdict = judge(self._objective, [record], KEY)
            if self._verdict is None or verdict.score > self._verdict.score:
                self._verdict, self.step, self._waited = verdict, record["step"], 0
            else:
                self._waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` validations in a row were no better."""
        return 0 < self._patience <= self._waited

    def described(self, trained: int) -> dict[str, Any]:
        """What `result.json` says about it: which step is kept, and why.

        Args:
            trained: the step at which training ended.
        """
        if self._verdict is None or self._objective is None:
            return {}
        return {
            "kept": {
                "step": self.step,
                "trained_steps": trained,
                "ended_early": self.exhausted and trained < self._steps,
                "metric": self._objective.metric,
                "value": self._verdict.value,
                "reached": self._verdict.reached,
                "bounds": dict(self._objective.subject_to),
                "feasible": self._verdict.feasible,
            }
        }
