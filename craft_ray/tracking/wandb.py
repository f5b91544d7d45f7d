"""Runs in Weights & Biases, online or as files."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from craft_ray.errors import ConfigError, StorageError
from craft_ray.extras import install, missing
from craft_ray.tracking.content import flatten, numbers, reason
from craft_ray.tracking.tracker import STATUS, Status, TrackedRun

if TYPE_CHECKING:
    from craft_ray.run.metrics import Record

UPLOAD_S = 60


class WandbTracker:
    """Runs in a project of Weights & Biases. The children of a run form the group that is named after its id.

    Offline runs are in `folder/wandb`, for `wandb sync`. A resumed offline run has one folder for each process.
    """

    name = "wandb"

    def __init__(self, mode: Literal["offline", "online"], project: str, folder: Path) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        if lacking := missing("wandb"):
            raise ConfigError(f"tracking.wandb is set, but {lacking}: {install('wandb')}")
        import wandb

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be created ({error.strerror}): choose another folder") from None
        if not os.access(folder, os.W_OK):  # wandb would fall back to the directory for temporary files
            raise ConfigError(f"{folder} cannot be written: choose another folder")
        self._mode = mode
        self._project = project
        self._folder = folder
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=UPLOAD_S,
            finish_timeout_raises=True,
        )
        wandb.setup(wandb.Settings(silent=True))
        if mode == "online":
            self._log_in()

    def _log_in(self) -> None:
        import wandb

        try:
            known = wandb.login(verify=True, prompt=False)
        except wandb.Error as error:
            raise ConfigError(
                f"Weights & Biases refuses the login ({reason(error)}): fix WANDB_API_KEY or the network, or set "
                f"tracking.wandb=offline"
            ) from None
        if not known:
            raise ConfigError(
                "tracking.wandb=online needs a key: set WANDB_API_KEY, run 'wandb login', or set tracking.wandb=offline"
            )

    def start(
        self, name: str, params: Mapping[str, Any], parent: TrackedRun | None = None, id: str | None = None
    ) -> WandbRun:
        import wandb

        try:
            run = wandb.init(
                project=self._project,
                dir=self._folder,
                # A readable id: it names the folder of an offline run, and the group of a run's children.
                id=id or f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[:100]}-{secrets.token_hex(4)}",
                name=name,
                group=None if parent is None else parent.id,
                config=flatten(params),
                allow_val_change=True,
                mode=self._mode,
                reinit="create_new",
                resume="allow" if self._mode == "online" else None,  # offline, there is no server to ask
                settings=self._settings,
            )
        except (wandb.Error, OSError) as error:
            raise StorageError(f"Weights & Biases does not accept the run {name} ({reason(error)})") from None
        # The record's step is the axis. W&B's own step drops values that are logged after a later step.
        run.define_metric("*", step_metric="step")
        return WandbRun(run)


class WandbRun:
    def __init__(self, run: Any) -> None:
        self.id = str(run.id)
        self._run = run

    def reached(self) -> int:
        return 0

    def log(self, records: Sequence[Record]) -> None:
        import wandb

        try:
            for record in records:
                if measured := numbers(record):
                    self._run.log({"step": record["step"], **measured, **_earlier_keys(record["step"], measured)})
        except (wandb.Error, OSError) as error:
            raise StorageError(f"Weights & Biases does not accept metrics ({reason(error)})") from None

    def end(self, status: Status) -> None:
        import wandb

        try:
            self._run.summary[STATUS] = status
            self._run.finish(exit_code=1 if status == "failed" else 0)
        except (wandb.Error, OSError) as error:
            raise StorageError(
                f"the run {self.id} was not sent to Weights & Biases in full ({reason(error)}): send it with "
                f"wandb sync {Path(self._run.dir).parent}"
            ) from None


def _earlier_keys(step: int, measured: Mapping[str, float]) -> dict[str, float]:
    """The keys that panels made for the earlier scripts ask for (docs/migration.md), in addition to ours."""
    keys: dict[str, float] = {"train/step": step}
    if "craft/conflict" in measured:
        keys["craft/grad_conflict"] = measured["craft/conflict"]
    return keys
