"""A constraint holds one old skill: L_ret(theta) <= epsilon on its anchors.

It owns everything that belongs to the skill: the cached anchors, which of them are held out, the order in which the
others are drawn, the budget and its multiplier, and the certificate at the end. All constraints of a run are in
`craft_ray/retention/constraints.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from craft_ray.config import CraftConfig, Experiment, batch_sizes, scores_of
from craft_ray.data.sampler import StepSampler
from craft_ray.errors import CacheRefused, DataError
from craft_ray.method.dual import DualState, epsilon_at, epsilon_reached
from craft_ray.models.base import evaluating
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Report, unreported
from craft_ray.retention.continuation import anchor_agreement
from craft_ray.retention.keep import KeptShare
from craft_ray.retention.mode import RetentionMode, batches_of
from craft_ray.workers import Workers

ANCHOR_STREAM = 1
"""Random stream of the anchors' order; the task's samples use stream 0 of the same seed."""
STEP0_ANCHORS = 64


class Constraint:
    """One old skill. With `craft.enabled` off it is only measured: it has no multiplier, and training takes no batches.

    Args:
        mode: how the skill's loss is measured, on a cache that it may share with other skills.
        skill: its name, where a config names several.
        stream: gives it an order of its own under the run's seed.
        report: receives how far a pass over the held-out anchors is that takes long.
        features: preprocessed anchors of earlier runs in this process.
    """

    def __init__(
        self,
        config: Experiment,
        mode: RetentionMode[Any],
        workers: Workers,
        skill: str | None = None,
        stream: int = ANCHOR_STREAM,
        report: Report = unreported,
        features: FeatureCache | None = None,
    ) -> None:
        self.skill = skill
        self.craft = craft_of(config, skill)
        self.mode = mode
        self.fingerprint = mode.fingerprint
        self.train_rows, self.heldout_rows = mode.split(self.craft.anchor_holdout, skill)
        self.dual = DualState.start(self.craft, workers.device) if self.craft.enabled else None
        self.share = None if self.craft.keep is None else KeptShare(self.craft.keep, self.craft.epsilon_start)
        self._workers = workers
        self._report = report
        self._features = features
        self._together = config.craft.anchor_batch_size
        self._steps = config.train.steps
        self._sampler = StepSampler(len(self.train_rows), self.craft.anchor_batch_size, config.seed, stream)
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

    def budget(self) -> str:
        """The budget in words."""
        craft = self.craft
        if craft.keep is not None:
            return f"keep {craft.keep:.0%} of the old skill, ε from {craft.epsilon_start:g}"
        ending = f" to {craft.epsilon_final:g}" if craft.epsilon_final != craft.epsilon_start else ""
        return f"ε {craft.epsilon_schedule} {craft.epsilon_start:g}{ending}"

    def unreached(self) -> str | None:
        """A warning about a budget that the run does not reach; None if it does."""
        craft = self.craft
        if not craft.epsilon_decay_steps or self.share is not None or self.final_epsilon == craft.epsilon_final:
            return None
        return (
            f"warning: ε decays over craft.epsilon_decay_steps {craft.epsilon_decay_steps}, but the run has "
            f"train.steps {self._steps}: it ends at {self.final_epsilon:.4g} instead of {craft.epsilon_final:g}, "
            f"and that is certified; for a fraction of the run set craft.epsilon_decay"
        )

    # -- a step

    def chosen(self, step: int) -> list[int]:
        """The rows of the cache that all workers together draw at a retention step (from 0), in order."""
        return [self.train_rows[i] for i in self._sampler.global_batch(step // self.craft.retention_freq)]

    def epsilon(self, step: int) -> float:
        """The budget at a step (from 0)."""
        return epsilon_at(step, self._steps, self.craft) if self.share is None else self.share.epsilon

    def observe(self, validation: Mapping[str, Any]) -> None:
        """Let the budget follow what a validation measured of the skill."""
        if self.share is None:
            return
        assert self.dual is not None, "only measured, not held"
        factor = self.share.observe(float(self.dual.mean_loss), validation[f"{scores_of(self.skill)}/bound"])
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
        """`retention_loss` on held-out anchors, and `violation`, max(0, L_ret / epsilon - 1) at the final epsilon."""
        loss = self.heldout_loss(step)
        return {"retention_loss": loss, "violation": max(0.0, loss / self.final_epsilon - 1)}

    @property
    def final_epsilon(self) -> float:
        """The budget at the last step, which is certified; where it follows the skill, as it is now."""
        return epsilon_reached(self._steps, self.craft) if self.share is None else self.share.epsilon

    def certificate(self, step: int) -> dict[str, Any]:
        """L_ret on anchors that training has not seen, against the final budget, and the budget that the model's last
        step was held to: a kept step may be one before the end of the schedule. `anchor_agreement` says how many of
        them the student continues as the teacher did, where the cache tells."""
        loss, epsilon = self.heldout_loss(step), self.final_epsilon
        multiplier = None if self.dual is None else float(self.dual.multiplier)
        agreement = anchor_agreement(
            self.mode, self.heldout_rows, self._together, self._workers, self._features, self._report
        )
        return {
            "retention_mode": self.mode.name,
            "retention_loss": loss,
            "epsilon": epsilon,
            "epsilon_at_step": self.epsilon(max(step - 1, 0)),
            "violation": max(0.0, loss / epsilon - 1),
            "feasible": loss <= epsilon,
            "anchors": len(self.train_rows),
            "heldout_anchors": len(self.heldout_rows),
            "lambda": multiplier,
            "slackness": None if multiplier is None else multiplier * (loss - epsilon),
            "lambda_max": self.craft.lambda_max,
            "multiplier": self._multiplier(),
            "cache": self.mode.cache,
        } | ({} if agreement is None else {"anchor_agreement": agreement})

    def _multiplier(self) -> str | None:
        """Whether lambda follows a budget, by its rate or, under `keep`, at validations; None if the skill is only
        measured."""
        if self.dual is None:
            return None
        moves = self.craft.lambda_lr or self.craft.lambda_kp or self.share is not None
        return "adaptive" if moves else "fixed"

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
            if self.mode.cache is None:
                raise CacheRefused(
                    f"the run was trained from a teacher with the hash {state['cache']}, and model.path now holds "
                    f"{self.fingerprint}: resume with the model that it started from"
                )
            raise CacheRefused(
                f"the run was trained with the anchor cache {state['cache']}, craft.anchor_cache_dir holds "
                f"{self.fingerprint}: resume with the cache that it started with"
            )
        self.dual = DualState.from_state_dict(state["dual"], self._workers.device)
        if self.share is not None:
            self.share.load_state_dict(state["share"])


def craft_of(config: Experiment, skill: str | None) -> CraftConfig:
    """The section `craft` for one skill: with its budget, its part of the anchor batch, and what must be kept of it."""
    craft = config.craft
    if skill is None:
        return craft
    own = config.skills[skill]
    start = own.epsilon_start or craft.epsilon_start
    tightened = None if craft.epsilon_end is None else craft.epsilon_end * start / craft.epsilon_start
    return craft.model_copy(
        update={
            "anchor_batch_size": batch_sizes(config.skills, craft.anchor_batch_size)[skill],
            "epsilon_start": start,
            "epsilon_end": tightened,
            "keep": config.kept_parts().get(skill),
        }
    )


@torch.no_grad()
def mean_loss(mode: RetentionMode[Any], rows: Sequence[int], batch_size: int, workers: Workers) -> float:
    """L_ret over `rows`, which the workers share. Where they share the model, too, all make the same passes: one
    without rows for the last repeats a row, which does not count."""
    parts = batches_of(rows[workers.rank :: workers.world_size], batch_size)
    most = len(batches_of(rows[:: workers.world_size], batch_size)) if mode.model.sharded else len(parts)
    sums = torch.zeros(2, dtype=torch.float64, device=workers.device)
    with evaluating(mode.model.module):
        for index in range(most):
            counts = index < len(parts)
            batch = mode.batch(parts[index] if counts else rows[:1]).to(workers.device)
            loss = mode.loss(batch).double()
            if counts:
                sums += torch.stack([loss * batch.count, sums.new_tensor(batch.count)])
    workers.all_reduce(sums)
    return float(sums[0] / sums[1])
