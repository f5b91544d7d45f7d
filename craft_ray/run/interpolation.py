"""Weights between the teacher's and those of a finished run: theta_0 + alpha (theta_1 - theta_0).

Nothing is trained: alpha 0 is the teacher, alpha 1 the run, and one validation each decides which one is taken.
Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), arXiv 2109.01903.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from craft_ray.config import Experiment
from craft_ray.errors import ConfigError, ModelError
from craft_ray.models import adapting, load_model
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.run.checkpoint import save_model
from craft_ray.run.folder import RunFolder
from craft_ray.run.held_out import SECTIONS, HeldOut, eval_sets
from craft_ray.run.judgement import judged
from craft_ray.run.metrics import Record, result_lines
from craft_ray.run.scoring import ratio
from craft_ray.storage.files import write_atomically
from craft_ray.storage.last import last_checkpoint
from craft_ray.storage.paths import StoragePath
from craft_ray.workers import Workers

ALPHAS = tuple(step / 10 for step in range(11))


class Interpolation:
    """A model whose weights are moved between two ends. Both are kept in memory in addition to it.

    Args:
        teacher: the model that moves; its weights are alpha 0.
        weights: every weight and buffer of the other end, alpha 1.

    Raises:
        ModelError: the two do not have the same weights.
    """

    def __init__(self, teacher: Model, weights: dict[str, Tensor]) -> None:
        self.model = teacher
        self._start = {name: tensor.clone() for name, tensor in teacher.module.state_dict().items()}
        self._end = weights
        shapes = ({name: tensor.shape for name, tensor in end.items()} for end in (self._start, self._end))
        if len({tuple(sorted(end.items())) for end in shapes}) > 1:
            raise ModelError("the run's model has other weights than the teacher: it cannot be interpolated with it")

    @torch.no_grad()
    def to(self, alpha: float) -> None:
        """Set every weight. Integers, such as counters, are those of the nearer end."""
        for name, tensor in self.model.module.state_dict().items():
            start, end = self._start[name], self._end[name].to(tensor.device)
            if tensor.is_floating_point():
                mixed = torch.lerp(start.float(), end.float(), alpha) if 0 < alpha < 1 else (start, end)[alpha >= 1]
                tensor.copy_(mixed)
            else:
                tensor.copy_(end if alpha >= 0.5 else start)


def between(
    config: Experiment, checkpoint: StoragePath, device: torch.device, model: Model | None = None
) -> Interpolation:
    """The teacher of a config and a checkpoint of a run of it, as two ends. An adapter is merged first.

    Args:
        model: the teacher, if it is loaded already.
    """
    student = load_model(config.model.on_host, config.train.precision, "cpu", str(checkpoint / "model"))
    if student.adapter is not None:
        adapting.merge(student)
    own = config.model.on_host if device.type == "cpu" else config.model
    teacher = model or load_model(own, config.train.precision, device)
    return Interpolation(teacher, student.module.state_dict())


def choose(records: Sequence[Record], keep: float | None) -> Record:
    """The best of several alphas by their validation scores: with `keep` the one that learns most among those that keep
    this part of the teacher's old score (or else keeps most), otherwise the one with the largest mean of both ratios,
    old to the teacher and new to alpha 1."""
    if keep is not None:
        enough = [record for record in records if record["old/ratio"] >= keep]
        if not enough:
            return max(records, key=lambda record: record["old/ratio"])
        return max(enough, key=lambda record: record["new/gain"])
    return max(records, key=lambda record: record["old/ratio"] + record["new/gain"])


def validated(path: Interpolation, held_out: HeldOut, metric: str, alphas: Sequence[float]) -> list[Record]:
    """The validation scores at each alpha, with `new/gain`, the new score relative to alpha 1.

    Args:
        metric: that of the new skill.

    Raises:
        ConfigError: the teacher or the run scores zero on a skill, so that there is no ratio.
    """
    scored: dict[float, Record] = {}
    for alpha in dict.fromkeys([*alphas, 1.0]):
        path.to(alpha)
        scored[alpha] = {"alpha": alpha, **held_out.validation()}
    records, last = [scored[alpha] for alpha in alphas], scored[1.0]["new/score"]
    for record in records:
        record["new/gain"] = ratio(metric, record["new/score"], last)
        if record["new/gain"] is None or record["old/ratio"] is None:
            raise ConfigError("alpha is chosen by ratios of scores, and the teacher or the run scores 0: specify it")
    return records


def interpolated(
    config: Experiment,
    source: RunFolder,
    folder: RunFolder,
    workers: Workers,
    say: Callable[[str], None],
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """Interpolate a finished run, with alpha chosen on validation data; write its model and its `result.json`, with a
    certificate of each part to keep that the config states.

    Args:
        config: that of the new run; its validation and evaluation score it.

    Raises:
        ConfigError: it names no validation data, or the run kept no checkpoint.
        ModelError: what was saved is not what was interpolated.
    """
    trained, checkpoint = source.finished(), last_checkpoint(source.checkpoints)
    if trained is None or checkpoint is None:
        raise ConfigError(f"{source.path} has no checkpoint to interpolate: train it with train.keep_checkpoints > 0")
    if not config.validates_both:
        raise ConfigError("alpha is chosen on validation data of an old skill and the new one: add both")
    assert config.validation.new is not None
    model = load_model(config.model, config.train.precision, workers.device)
    held_out = HeldOut(
        config, model, model.weights_fingerprint(), folder, workers, FeatureCache(), kept_parts=_stated(config)
    )
    held_out.score_teacher()
    path = between(config, checkpoint, workers.device, model)
    records = validated(path, held_out, config.validation.new.metric, alphas)
    chosen = choose(records, config.craft.keep)
    path.to(chosen["alpha"])
    held_out.forget_student()  # its last scores are those of the last alpha
    say(f"alpha {chosen['alpha']:g}: old {chosen['old/ratio']:.3f} of the teacher's, new {chosen['new/gain']:.3f}")
    result: dict[str, Any] = {"name": config.name, "arm": config.arm, "seed": config.seed, "steps": trained["steps"]}
    result |= held_out.evaluation()
    result |= judged({}, held_out.certificates(), result) | {"stationarity": None}
    result |= {"alpha": chosen["alpha"], "alphas": records, "of": str(source.path), "seconds": trained["seconds"]}
    save_model(config.model, config.train.precision, model, folder.disk / "model", "interpolated")
    write_atomically(folder.metrics, "")
    folder.write_result(result)
    say("; ".join(result_lines(result)))
    return result


def _stated(config: Experiment) -> dict[str | None, float]:
    """The parts that the config states of skills with held-out data, also where the interpolated run is plain."""
    measured = {skill for section in SECTIONS for skill, _ in eval_sets(config, section)}
    return {name: keep for name, keep in config.stated_parts().items() if (name or "old") in measured}
