"""The constraints of a run, and one update of the weights under them.

A run has none (plain fine-tuning without a cache), one, or one for each of several skills. These share a cache, a
retention mode, and the anchor batch of a step. The step itself is `craft_ray.method.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from craft_ray.anchors.manifest import read_manifest
from craft_ray.anchors.matching import check_model, select
from craft_ray.anchors.reader import open_anchors
from craft_ray.config import Experiment, scores_of
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.errors import ConfigError
from craft_ray.method.dual import DualState
from craft_ray.method.gradients import RETENTION, TASK, Counted, GradientPair
from craft_ray.method.step import StepMetrics, compares_gradients, craft_step, part_of_sum, task_step
from craft_ray.method.surgery import merged_norm
from craft_ray.models import teacher_of
from craft_ray.models.base import Model
from craft_ray.models.features import FeatureCache
from craft_ray.pace import Report, unreported
from craft_ray.retention import mode_named
from craft_ray.retention.constraint import ANCHOR_STREAM, Constraint
from craft_ray.retention.mixture import Mixture
from craft_ray.retention.mode import Opening, RetentionMode, SampleMode, Terms, split
from craft_ray.storage.paths import storage_path
from craft_ray.workers import Workers


def open_constraints(
    config: Experiment,
    model: Model,
    teacher_weights: str | None,
    workers: Workers,
    features: FeatureCache | None = None,
    report: Report = unreported,
) -> Constraints:
    """The constraints that a run enforces or only measures; none if its config names no anchor cache.

    Args:
        teacher_weights: hash of the untouched student's weights; None on resume, where the student is no longer the
            teacher and the checkpoint names the cache instead.
        features: preprocessed anchors of earlier runs in this process.
        report: receives how far a mode is that has to see all anchors before the first step, and how far the pass over
            the held-out ones is at the end.

    Raises:
        ConfigError: CRaFT is enabled and there is no cache to hold the student to, or the model or the retention mode
            cannot be held to such anchors.
        CacheRefused: the cache does not belong to this model and config.
    """
    stored = RETENTION_MODES[config.craft.retention_mode].stores
    if config.craft.anchor_cache_dir is None and (stored or not config.craft.enabled):
        if not config.craft.enabled:
            return Constraints(config, [], workers)
        raise ConfigError(
            "craft is enabled, but craft.anchor_cache_dir names no cache: build one with 'craft-ray anchors build', or "
            "set craft.enabled=false for plain fine-tuning"
        )
    report = report if workers.rank == 0 else unreported
    mode = open_mode(config, model, teacher_weights, features, report)
    if not config.skills:
        return Constraints(config, [Constraint(config, mode, workers, report=report, features=features)], workers)
    if not isinstance(mode, SampleMode):
        raise ConfigError(f"craft.retention_mode {mode.name} holds no single anchors, so it cannot hold several skills")
    streams = enumerate(config.skills, ANCHOR_STREAM)
    each = [Constraint(config, mode, workers, name, stream, report, features) for stream, name in streams]
    return Constraints(config, each, workers)


def open_mode(
    config: Experiment,
    model: Model,
    teacher_weights: str | None,
    features: FeatureCache | None = None,
    report: Report = unreported,
) -> RetentionMode[Any]:
    """The retention mode of a run on its cache, after every check that the cache's identity allows.

    Args:
        teacher_weights: hash of the untouched student's weights; None on resume, where the student is no longer the
            teacher and the checkpoint names the cache instead.
        features: preprocessed anchors of earlier runs in this process.
        report: as in `open_constraints`.

    Raises:
        CacheRefused: the cache belongs to another teacher or preprocessor, or lacks what the config asks for.
        ConfigError: the model cannot be held to such anchors.
    """
    craft, features = config.craft, features or FeatureCache()
    teacher = teacher_of(config, model, teacher_weights is not None)
    if not RETENTION_MODES[craft.retention_mode].stores:
        return mode_named(craft.retention_mode).open(Opening(craft, model, None, (), (), features, teacher, report))
    assert craft.anchor_cache_dir is not None
    folder = storage_path(craft.anchor_cache_dir)
    manifest = read_manifest(folder)
    check_model(folder, manifest.identity, config, model, teacher_weights)
    layers, positions = select(folder, manifest.identity, config)
    if craft.enabled:
        model.check_anchors([craft.retention_mode], positions)
    anchors = open_anchors(folder, manifest)
    run = Opening(craft, model, anchors, layers, positions, features, teacher, report)
    return mode_named(craft.retention_mode).open(run)


class Constraints:
    """The old skills of a run. Those that are `held` have multipliers; others are only measured."""

    def __init__(self, config: Experiment, each: Sequence[Constraint], workers: Workers) -> None:
        self.each = list(each)
        self.held = [constraint for constraint in each if constraint.held]
        self.craft = config.craft
        self._steps = config.train.steps
        self._micro_batches = config.train.accumulate
        self._workers = workers
        self._mixture: Mixture | None = None
        if config.skills and self.held:
            mode = self.held[0].mode
            assert isinstance(mode, SampleMode)
            self._mixture = Mixture(mode, len(self.held))

    def __bool__(self) -> bool:
        """Whether training is held to a budget."""
        return bool(self.held)

    @property
    def compares_gradients(self) -> bool:
        """Whether a step needs the two gradients apart."""
        return bool(self.held) and compares_gradients(self.craft)

    def gradient_pair(self, model: Model) -> GradientPair:
        """Memory for the gradients of a model's trainable weights, as the constraints need it."""
        module: Any = model.module
        return GradientPair(
            module.named_parameters(),
            with_retention=self.compares_gradients,
            short_retention=self.craft.retention_grad_dtype == "bfloat16",
            sharded=module if model.trains_shards else None,
        )

    def check_untouched(self) -> None:
        """Check that the untouched student reproduces the cache, where training is held to it.

        Raises:
            CacheRefused: it does not.
        """
        for constraint in self.each:
            constraint.check_untouched()

    def described(self) -> list[str]:
        """A line each about the retention mode, the anchors, the method's settings, and each skill by name; and one
        about budgets that the run does not reach."""
        if not self.held:
            return ["CRaFT is off: plain fine-tuning (the baseline arm)"]
        craft, mode = self.craft, self.held[0].mode
        surgery = "projection off"
        if craft.use_grad_projection:
            surgery = f"projection {craft.projection_gate} below {craft.conflict_measure} {craft.conflict_threshold:g}"
        trained, held_out = (sum(len(getattr(c, rows)) for c in self.held) for rows in ("train_rows", "heldout_rows"))
        budget = f"{len(self.held)} skills" if self._mixture is not None else self.held[0].budget()
        lines = [
            f"Retention mode: {mode.name}",
            f"{trained} anchors loaded, {held_out} more held out",
            f"CRaFT is enabled: {mode.name} ({mode.description}), every {craft.retention_freq} step(s), "
            f"{budget}, λ from {self.held[0].craft.lambda_start:g} by {craft.lambda_lr:g} up to {craft.lambda_max:g}, "
            f"{craft.projection_mode} merge, {surgery}",
        ]
        lines += [
            f"Skill {c.skill}: {len(c.train_rows)} anchors, {c.craft.anchor_batch_size} of the "
            f"{craft.anchor_batch_size} in a batch, {c.budget()}"
            for c in self.held
            if c.skill is not None
        ]
        unreached = self.held[0].unreached()
        return lines if unreached is None else [*lines, unreached]

    # -- a step

    def batches(self, step: int) -> list[Terms] | None:
        """This worker's micro-batches of a step (from 0), on the host; None between two retention steps, and in plain
        fine-tuning."""
        if not self.held or step % self.craft.retention_freq:
            return None
        drawn = [(row, index) for index, constraint in enumerate(self.held) for row in constraint.chosen(step)]
        size = len(drawn) // self._workers.world_size
        own = drawn[self._workers.rank * size : (self._workers.rank + 1) * size]
        parts = split(own, self._micro_batches)
        if self._mixture is None:
            return [self.held[0].mode.batch([row for row, _ in part]) for part in parts]
        return [self._mixture.batch([row for row, _ in part], [index for _, index in part]) for part in parts]

    def epsilons(self, step: int) -> list[float]:
        """The budgets at a step (from 0)."""
        return [constraint.epsilon(step) for constraint in self.held]

    def update(
        self,
        task_loss: Callable[[Any], Tensor],
        task: Sequence[Counted],
        anchors: Sequence[Terms] | None,
        step: int,
        *,
        optimizer: Optimizer,
        gradients: GradientPair,
        max_norm: float | None,
    ) -> StepMetrics:
        """Take step `step` (from 0): a CRaFT step if a constraint is held, otherwise plain fine-tuning.

        Args:
            task, anchors: this worker's micro-batches on its device; `anchors` is None between two retention steps.
        """
        if not self.held:
            loss, norm = task_step(
                task_loss, task, optimizer=optimizer, gradients=gradients, workers=self._workers, max_norm=max_norm
            )
            nan = loss.new_full((), float("nan"))
            return StepMetrics(loss, norm, nan, nan, nan, nan, nan, nan, nan)
        states = self._states()
        epsilon: float | Tensor = self.held[0].epsilon(step)
        noise_floor: float | Tensor = self.held[0].noise_floor
        retention_loss = self.held[0].mode.loss
        if self._mixture is not None:
            epsilon = states.multiplier.new_tensor(self.epsilons(step))
            noise_floor = states.multiplier.new_tensor([constraint.noise_floor for constraint in self.held])
            retention_loss = self._mixture.sums
        following, metrics = craft_step(
            task_loss,
            task,
            retention_loss,
            anchors,
            states,
            epsilon,
            craft=self.craft,
            optimizer=optimizer,
            gradients=gradients,
            workers=self._workers,
            max_norm=max_norm,
            noise_floor=noise_floor,
        )
        apart = [following] if self._mixture is None else following.apart()
        for constraint, state in zip(self.held, apart, strict=True):
            constraint.dual = state
        return metrics

    def _states(self) -> DualState:
        states = [constraint.dual for constraint in self.held if constraint.dual is not None]
        return states[0] if self._mixture is None else DualState.together(states)

    def observe(self, validation: dict[str, Any]) -> None:
        """Let the budgets follow what a validation measured, and note them in its record."""
        for constraint in self.held:
            constraint.observe(validation)
            if constraint.share is not None:
                prefix = "craft" if constraint.skill is None else scores_of(constraint.skill)
                validation[f"{prefix}/next_epsilon"] = constraint.share.epsilon

    # -- results

    def validation(self, step: int) -> dict[str, float]:
        """`heldout/retention_loss` and `heldout/violation`; of several skills those of the most violated one, and each
        skill's own (`skills/NAME/retention_loss`, `skills/NAME/violation`)."""
        found = {constraint.skill: constraint.validation(step) for constraint in self.each}
        if not found:
            return {}
        worst = max(found.values(), key=lambda losses: losses["violation"])
        record = {f"heldout/{key}": value for key, value in worst.items()}
        for skill, losses in found.items():
            if skill is not None:
                record |= {f"{scores_of(skill)}/{key}": value for key, value in losses.items()}
        return record

    def certificates(self, step: int) -> dict[str | None, dict[str, Any]]:
        """L_ret of each skill on anchors that training has not seen, against its final budget, and on how many of them
        student and teacher agree."""
        return {constraint.skill: constraint.certificate(step) for constraint in self.each}

    def stationarity(
        self,
        task_loss: Callable[[Any], Tensor],
        task: Sequence[Counted],
        anchors: Sequence[Any],
        gradients: GradientPair,
    ) -> float:
        """|g_t + sum_i lambda_i g_i| / |g_t|: 0 at a solution where a budget binds, 1 where every lambda is 0 or the
        gradients are orthogonal. It is as noisy as the batch is small.

        Args:
            task, anchors: this worker's micro-batches on its device.
        """
        states = self._states()
        if self._mixture is None:
            gradients.backward(RETENTION, self.held[0].mode.loss, anchors, self._workers)
        else:
            shares = part_of_sum(states.multiplier)
            gradients.backward_parts(RETENTION, self._mixture.sums, anchors, shares, self._workers)
        gradients.backward(TASK, task_loss, task, self._workers)
        gram = gradients.gram()
        return float(merged_norm(gram, 1.0, states.multiplier.sum()) / gram.task_sq.sqrt())

    # -- state

    def state_dicts(self) -> list[dict[str, Any]]:
        """What the next step depends on."""
        return [constraint.state_dict() for constraint in self.held]

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `state_dicts` returned.

        Raises:
            CacheRefused: the states belong to a run with another cache.
        """
        for constraint, state in zip(self.held, states, strict=True):
            constraint.load_state_dict(dict(state))
