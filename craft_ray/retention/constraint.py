"""A constraint holds one old skill: L_ret(theta) <= epsilon on its anchors.

It owns everything that belongs to the skill: the cached anchors, which of them are held out, the order in which the
others are drawn, the budget and its multiplier, and the certificate at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.matching import check_model, select
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment
from craft_ray.data.sampler import StepSampler
from craft_ray.errors import CacheRefused, DataError
from craft_ray.method.dual import DualState, epsilon_at, epsilon_reached
from craft_ray.models.base import Model, evaluating
from craft_ray.models.features import FeatureCache
from craft_ray.retention import mode_named
from craft_ray.retention.keep import KeptShare
from craft_ray.retention.mode import Opening, RetentionMode, Terms, batches_of
from craft_ray.storage.paths import storage_path
from craft_ray.workers import Workers

ANCHOR_STREAM = 1
"""Random stream of the anchors' order; the task's samples use stream 0 of the same seed."""
STEP0_ANCHORS = 64


def open_mode(
    config: Experiment, model: Model, teacher_weights: str | None, features: FeatureCache | None = None
) -> RetentionMode[Any]:
    """The retention mode of a run on its cache, after every check that the cache's identity allows.

    Args:
        teacher_weights: hash of the untouched student's weights; None on resume, where the student is no longer the
            teacher and the checkpoint names the cache instead.
        features: preprocessed anchors of earlier runs in this process.

    Raises:
        CacheRefused: the cache belongs to another teacher or preprocessor, or lacks what the config asks for.
        ConfigError: the model cannot be held to such anchors.
    """
    craft = config.craft
    assert craft.anchor_cache_dir is not None
    folder = storage_path(craft.anchor_cache_dir)
    manifest = read_manifest(folder)
    check_model(folder, manifest.identity, config, model, teacher_weights)
    layers, positions = select(folder, manifest.identity, config)
    if craft.enabled:
        model.check_anchors([craft.retention_mode], positions)
    anchors = open_anchors(folder, manifest)
    run = Opening(craft, model, anchors, layers, positions, features or FeatureCache())
    return mode_named(craft.retention_mode).open(run)


class Constraint:
    """One old skill. With `craft.enabled` off it is only measured: it has no multiplier, and training takes no batches.

    Args:
        mode: how the skill's loss is measured, on its cache.
    """

    def __init__(self, config: Experiment, mode: RetentionMode[Any], workers: Workers) -> None:
        self.craft = config.craft
        self.mode = mode
        self.fingerprint = mode.anchors.fingerprint
        self.train_rows, self.heldout_rows = mode.anchors.split(self.craft.anchor_holdout)
        self.dual = DualState.start(self.craft, workers.device) if self.craft.enabled else None
        self.share = None if self.craft.keep is None else KeptShare(self.craft.keep, self.craft.epsilon_start)
        self._workers = workers
        self._steps = config.train.steps
        self._micro_batches = config.train.accumulate
        self._sampler = StepSampler(len(self.train_rows), self.craft.anchor_batch_size, config.seed, ANCHOR_STREAM)
        self._heldout: tuple[int, float] | None = None
        self.noise_floor = mode.noise_floor(self.train_rows[:STEP0_ANCHORS])

    @property
    def held(self) -> bool:
        """Whether training is held to the budget, rather than only measured against it."""
        return self.dual is not None

    def check_untouched(self) -> None:
        """Check that the untouched student reproduces the cache, if training is held to it; note its loss if the budget
        follows the skill.

        Raises:
            CacheRefused: it does not.
        """
        if self.held:
            self.mode.check_untouched(self.train_rows[:STEP0_ANCHORS], self.craft.anchor_batch_size)
            if self.share is not None:
                rows = self.train_rows[:STEP0_ANCHORS]
                self.share.start(mean_loss(self.mode, rows, self.craft.anchor_batch_size, self._workers))

    def described(self) -> list[str]:
        """A line each about the retention mode, the anchors and the method's settings; and one about a budget that the
        run does not reach."""
        craft = self.craft
        budget = f"ε {craft.epsilon_schedule} {craft.epsilon_start:g}"
        if craft.epsilon_final != craft.epsilon_start:
            budget += f" to {craft.epsilon_final:g}"
        if craft.keep is not None:
            budget = f"keep {craft.keep:.0%} of the old skill, ε from {craft.epsilon_start:g}"
        surgery = "projection off"
        if craft.use_grad_projection:
            surgery = f"projection {craft.projection_gate} below cosine {craft.conflict_threshold:g}"
        lines = [
            f"Retention mode: {self.mode.name}",
            f"{len(self.train_rows)} anchors loaded, {len(self.heldout_rows)} more held out",
            f"CRaFT is enabled: {self.mode.name} ({self.mode.description}), every {craft.retention_freq} step(s), "
            f"{budget}, λ from {craft.initial_lambda:g} by {craft.lambda_lr:g} up to {craft.lambda_max:g}, "
            f"{craft.projection_mode} merge, {surgery}",
        ]
        if craft.epsilon_decay_steps and self.share is None and self.final_epsilon != craft.epsilon_final:
            lines.append(
                f"warning: ε decays over craft.epsilon_decay_steps {craft.epsilon_decay_steps}, but the run has "
                f"train.steps {self._steps}: it ends at {self.final_epsilon:.4g} instead of {craft.epsilon_final:g}, "
                f"and that is certified; for a fraction of the run set craft.epsilon_decay"
            )
        return lines

    # -- a step

    def batches(self, step: int) -> list[Terms] | None:
        """This worker's micro-batches of a step (from 0), on the host; None between two retention steps."""
        if step % self.craft.retention_freq:
            return None
        rank, size = self._workers.rank, self._workers.world_size
        chosen = self._sampler.local_batch(step // self.craft.retention_freq, rank, size)
        return [self.mode.batch([self.train_rows[i] for i in part]) for part in split(chosen, self._micro_batches)]

    def epsilon(self, step: int) -> float:
        """The budget at a step (from 0)."""
        return epsilon_at(step, self._steps, self.craft) if self.share is None else self.share.epsilon

    def observe(self, validation: Mapping[str, Any]) -> None:
        """Let the budget follow what a validation measured of the skill."""
        if self.share is None:
            return
        assert self.dual is not None, "only measured, not held"
        factor = self.share.observe(float(self.dual.mean_loss), validation["old/bound"])
        self.dual = self.dual.scaled(1 / factor, self.craft)

    # -- results

    def heldout_loss(self, step: int) -> float:
        """L_ret after `step` steps on the held-out anchors, or on all anchors if none are held out.

        Raises:
            DataError: it is not finite.
        """
        if self._heldout is None or self._heldout[0] != step:
            loss = mean_loss(
                self.mode, self.heldout_rows or self.train_rows, self.craft.anchor_batch_size, self._workers
            )
            if not math.isfinite(loss):
                raise DataError(f"the retention loss on held-out anchors is {loss}: the last checkpoint is not usable")
            self._heldout = (step, loss)
        return self._heldout[1]

    def validation(self, step: int) -> dict[str, float]:
        """`heldout/retention_loss` and `heldout/violation`, max(0, L_ret / epsilon - 1) at the final epsilon."""
        loss = self.heldout_loss(step)
        return {"heldout/retention_loss": loss, "heldout/violation": max(0.0, loss / self.final_epsilon - 1)}

    @property
    def final_epsilon(self) -> float:
        """The budget at the last step, which is certified; where it follows the skill, as it is now."""
        return epsilon_reached(self._steps, self.craft) if self.share is None else self.share.epsilon

    def certificate(self, step: int) -> dict[str, Any]:
        """L_ret on anchors that training has not seen, against the final budget."""
        loss, epsilon = self.heldout_loss(step), self.final_epsilon
        multiplier = None if self.dual is None else float(self.dual.multiplier)
        return {
            "retention_mode": self.mode.name,
            "retention_loss": loss,
            "epsilon": epsilon,
            "violation": max(0.0, loss / epsilon - 1),
            "feasible": loss <= epsilon,
            "heldout_anchors": len(self.heldout_rows),
            "lambda": multiplier,
            "slackness": None if multiplier is None else multiplier * (loss - epsilon),
            "lambda_max": self.craft.lambda_max,
            "cache": self.fingerprint,
        }

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on: the multiplier's state, and which cache it belongs to."""
        assert self.dual is not None, "a constraint that is only measured has no state"
        state = {"dual": self.dual.state_dict(), "cache": self.fingerprint}
        return state if self.share is None else {**state, "share": self.share.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            CacheRefused: the state belongs to a run with another cache.
        """
        if state["cache"] != self.fingerprint:
            raise CacheRefused(
                f"the run was trained with the anchor cache {state['cache']}, craft.anchor_cache_dir holds "
                f"{self.fingerprint}: resume with the cache that it started with"
            )
        self.dual = DualState.from_state_dict(state["dual"], self._workers.device)
        if self.share is not None:
            self.share.load_state_dict(state["share"])


def split(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Micro-batches of equal size."""
    return batches_of(rows, len(rows) // parts)


@torch.inference_mode()
def mean_loss(mode: RetentionMode[Any], rows: Sequence[int], batch_size: int, workers: Workers) -> float:
    """L_ret over `rows`, which the workers share."""
    sums = torch.zeros(2, dtype=torch.float64, device=workers.device)
    with evaluating(mode.model.module):
        for part in batches_of(rows[workers.rank :: workers.world_size], batch_size):
            batch = mode.batch(part).to(workers.device)
            sums += torch.stack([mode.loss(batch).double() * batch.count, sums.new_tensor(batch.count)])
    workers.all_reduce(sums)
    return float(sums[0] / sums[1])
