"""`craft-ray interpolate`: a model between the teacher of a run and the run, as a plain folder, in this process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from craft_pipelines.merge import checkpoint_of
from craft_pipelines.outputs import check_new_folder
from craft_ray.errors import ConfigError
from craft_ray.models.features import FeatureCache
from craft_ray.run.checkpoint import save_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.held_out import HeldOut
from craft_ray.run.interpolation import ALPHAS, between, choose, validated
from craft_ray.storage.paths import StoragePath
from craft_ray.workers import OneWorker


def interpolate(path: StoragePath, out: StoragePath, alpha: float | None, say: Any = print) -> None:
    """Save theta_0 + alpha (theta_1 - theta_0) in a new folder.

    Args:
        path: the run, whose last checkpoint is theta_1, or one of its checkpoints.
        alpha: without one, ten are scored on the config's validation data, and the best is taken.

    Raises:
        ConfigError: there is no such run or checkpoint, `out` exists, or there are no validation data to choose by.
        ModelError: what was saved is not what was interpolated.
    """
    check_new_folder(out, "the model")
    run, checkpoint = checkpoint_of(path)
    config = run.config()
    if not (checkpoint / "model").exists():
        raise ConfigError(
            f"{checkpoint} is in parts, as its workers wrote it: take the run's last one, or merge it first"
        )
    if alpha is None and not config.validates_both:
        raise ConfigError(
            f"the run {run.path} has no validation data of an old skill and the new one to choose alpha by: "
            f"specify one, e.g. --alpha 0.5"
        )
    mix = between(config, checkpoint, torch.device("cpu"))
    if alpha is None:
        assert config.validation.new is not None
        with tempfile.TemporaryDirectory() as scratch:
            teacher = mix.model.weights_fingerprint()
            folder = RunFolder(Path(scratch) / "run")
            held_out = HeldOut(config, mix.model, teacher, folder, OneWorker(), FeatureCache())
            held_out.score_teacher()
            records = validated(mix, held_out, config.validation.new.metric, ALPHAS)
        for record in records:
            say(f"alpha {record['alpha']:.1f}: old {record['old/score']:.3f}, new {record['new/score']:.3f}")
        alpha = float(choose(records, config.craft.keep)["alpha"])
    mix.to(alpha)
    save_model(config.model, config.train.precision, mix.model, out, "interpolated")
    say(f"{config.model.path} + {alpha:g} of the way to {checkpoint}: {out}")
