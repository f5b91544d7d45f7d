"""A sweep on disk: its plan, and a folder for each trial with its setting, its reports and its outcome.

All results of a sweep are read from here, and a resumed sweep finds out here what is done. A trial is one setting; it
trains one run for each seed, one after the other, each in a separate folder.

    sweep.yaml                 the config, the space and the hashes of the data, as they were at the start
    trials/0003/params.json    the setting
    trials/0003/reports.jsonl  a line for each validation
    trials/0003/outcome.json   finished, stopped or failed, and why; missing while a trial is open
    trials/0003/seed0/         a run folder
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from craft_ray.config import Experiment, parse_config, read_yaml
from craft_ray.errors import ConfigError
from craft_ray.run.folder import RunFolder, read_records
from craft_ray.storage.files import write_atomically
from craft_ray.storage.paths import StoragePath
from craft_ray.sweep.space import Params, Space, parse_space

Status = Literal["open", "finished", "stopped", "failed"]
Report = dict[str, Any]
"""`step`: steps over all seeds so far; `seeds`: runs that the numbers cover; `metrics`: their means; `params`;
`value`, `reached`, `violations`, `feasible`, `score`: the verdict (craft_ray.run.objective); `seconds`: since the
trial started."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    status: Status
    reason: str | None = None


class TrialFolder:
    """The folder of one trial."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self.number = int(path.name)

    def begin(self, params: Params) -> None:
        write_atomically(self.path / "params.json", json.dumps(params))

    def params(self) -> Params | None:
        """The setting; None before the trial has started."""
        path = self.path / "params.json"
        return json.loads(path.read_text()) if path.exists() else None

    def reports(self) -> list[Report]:
        return read_records(self.path / "reports.jsonl")

    def add_report(self, report: Report) -> None:
        """Append a report; it replaces those of its step or later."""
        self._keep_reports([known for known in self.reports() if known["step"] < report["step"]] + [report])

    def drop_reports_after(self, step: int) -> None:
        """Remove the reports after a step, when the trial returns to it."""
        self._keep_reports([known for known in self.reports() if known["step"] <= step])

    def _keep_reports(self, reports: list[Report]) -> None:
        write_atomically(self.path / "reports.jsonl", "".join(json.dumps(report) + "\n" for report in reports))

    def outcome(self) -> Outcome:
        path = self.path / "outcome.json"
        return Outcome(**json.loads(path.read_text())) if path.exists() else Outcome("open")

    def end(self, status: Status, reason: str | None = None) -> None:
        """Record how the trial ended. The first record stays."""
        if self.outcome().status == "open":
            write_atomically(self.path / "outcome.json", json.dumps({"status": status, "reason": reason}))

    def read_error(self) -> str | None:
        """The error that ended the last attempt, if the attempt could still record it."""
        path = self.path / "error.txt"
        return path.read_text() if path.exists() else None

    def write_error(self, message: str | None) -> None:
        """Record the error that ends an attempt; None removes the record."""
        if message is None:
            (self.path / "error.txt").unlink(missing_ok=True)
        else:
            write_atomically(self.path / "error.txt", message)

    def run(self, seed: int) -> RunFolder:
        return RunFolder(self.path / f"seed{seed}", shared=self.path.parent)


@dataclass(frozen=True)
class Plan:
    """What is searched, and the command that started it."""

    config: Experiment
    space: Space
    command: list[str]
    data: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the data that the sweep began with, of the task and of the validation sets, by their key. None are
    recorded for one that began with an earlier version."""


class SweepFolder:
    """The folder of a sweep."""

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        self.plan = path / "sweep.yaml"
        self.scratch = path / ".ray"
        self.new = False
        """Whether this process started it."""

    def begin(self, plan: Plan) -> None:
        """Write the plan.

        Raises:
            ConfigError: the folder already holds a sweep.
        """
        if self.plan.exists():
            raise ConfigError(
                f"{self.path} already holds a sweep: resume it with --resume {self.path}, or choose another folder "
                f"(--out)"
            )
        # Half-written files of a killed process have names that start with a dot, as the lock does.
        if self.path.exists() and not all(entry.name.startswith(".") for entry in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no sweep: choose another folder (--out)")
        self.write(plan)
        self.new = True

    def write(self, plan: Plan) -> None:
        tree = {
            "command": plan.command,
            "data": dict(plan.data),
            "space": {"name": plan.space.name, "knobs": plan.space.source},
            "config": plan.config.model_dump(mode="json"),
        }
        write_atomically(self.plan, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

    def load(self) -> Plan:
        """Read the plan.

        Raises:
            ConfigError: there is no sweep in the folder.
        """
        if not self.plan.exists():
            raise ConfigError(
                f"{self.path} holds no sweep (no sweep.yaml): specify the folder of a sweep that was started"
            )
        tree = read_yaml(self.plan.read_text())
        config = parse_config(tree["config"], str(self.plan))
        space = parse_space(tree["space"]["knobs"], tree["space"]["name"])
        return Plan(config, space, tree["command"], tree.get("data", {}))

    def assign(self, trial_id: str, number: int) -> None:
        """Record which trial Tune's `trial_id` is."""
        write_atomically(self.scratch / "ids" / trial_id, str(number))

    def trial_of(self, trial_id: str) -> TrialFolder:
        return self.trial(int((self.scratch / "ids" / trial_id).read_text()))

    def trial(self, number: int) -> TrialFolder:
        return TrialFolder(self.path / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialFolder]:
        """The trials that have started, by number."""
        folders = [TrialFolder(path) for path in (self.path / "trials").glob("[0-9]*")]
        return sorted((trial for trial in folders if trial.params() is not None), key=lambda trial: trial.number)


def trial_config(base: Experiment, params: Params, trial: TrialFolder, seed: int) -> Experiment:
    """The config of one run of a trial: scored only on validation data, and saved only where that is needed.

    A checkpoint is kept if the config asks for checkpoints, so that a lost trial resumes, and for pbt, which copies it.
    """
    own: dict[str, Any] = {
        "seed": seed,
        "output_dir": str(trial.path),
        "evaluation": {"old": None, "new": None},
        **{f"skills.{skill}.evaluation": None for skill in base.skills},
        "train.keep_best": None,  # the objective judges each validation
        "train.patience": 0,
        "train.keep_checkpoints": 1 if base.train.checkpoint_every else 0,
        # Set explicitly: a run without validation data would not validate at its end.
        "validation.every": base.validation.every or params.get("train.steps", base.train.steps),
    }
    if base.sweep.scheduler == "pbt":
        own |= {"train.keep_checkpoints": 1, "train.checkpoint_every": base.validation.every}
    return base.changed({**params, **own})


def seeds(base: Experiment, params: Params) -> list[int]:
    """The seeds that a setting is run on."""
    first = params.get("seed", base.seed)
    return [first + number for number in range(base.sweep.repeat)]
