"""Retention of the old skill: the anchors, and the constraint on forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from craft_ray.config.data import DataConfig
from craft_ray.config.modes import RetentionMode, unit_of
from craft_ray.config.paths import FolderPath
from craft_ray.config.types import Fraction, Layers, Positions, Section, distinct


class LogitsConfig(Section):
    """What retention mode `logits` stores at every token of its positions."""

    k: int = Field(32, ge=1)
    """Most likely next tokens that are stored, with their log-probabilities. All others are one class, whose mass is
    also stored."""
    temperature: float = Field(1.0, gt=0)
    """Temperature at which the distributions of teacher and student are compared. The mass of the other tokens depends
    on it, so it belongs to the cache."""
    positions: Positions = None
    """Tokens after which the next token is predicted: any positions but means, e.g. `suffix` or `all`. Default: the
    model's own default for anchors (docs/anchors.md)."""


class AnchorsConfig(Section):
    """The samples that the teacher is run on, and which of its outputs are stored."""

    source: DataConfig | None = None
    """The inputs of the old skill. Several skills may have one each instead (section `skills`)."""
    modes: Annotated[tuple[RetentionMode, ...], AfterValidator(distinct)] = ("hidden", "token_ce")
    """`hidden` stores hidden states, `token_ce` the teacher's own greedily generated suffix tokens, `logits` the
    teacher's most likely next tokens, `replay` the data's responses."""
    positions: Positions = None
    """Token positions whose hidden states are stored. Default: `suffix` for vision-language models and
    with `model.chat_template`, `all` for other language models, which performed best (docs/anchors.md)."""
    layers: Annotated[tuple[int, ...], AfterValidator(distinct)] = (-2, -1)
    """Indices into the hidden states: 0 is the embeddings, k the output of block k, the last one after the final
    norm. Negative indices count from the end."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage type of hidden states and log-probabilities. float16 refuses values that overflow."""
    logits: LogitsConfig = LogitsConfig()
    max_new_tokens: int = Field(16, ge=1)
    """Longest suffix that the teacher generates."""
    suffix_from: Literal["teacher", "response"] = "teacher"
    """Whether the suffix tokens are the teacher's own or the data's responses."""
    batch_size: int = Field(32, ge=1)
    """Samples in one forward pass of the teacher, if samples are padded."""
    pack_tokens: int | None = Field(None, ge=0)
    """Tokens of one forward pass in which prompts of a language model are packed end to end, without padding; 0 pads.
    Default: 2048 for a model that supports packing. The stored numbers are the same."""
    rows_per_shard: int = Field(1024, ge=1)
    """Rows of a shard, the unit of work and of what is repeated after an interruption."""
    actors: int = Field(1, ge=1)
    """Teachers that run in parallel."""
    cpus_per_actor: float = Field(1.0, ge=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    """GPUs of one teacher; a fraction shares one. Over 2 and more its layers are spread, for a teacher that is larger
    than a GPU (needs the package accelerate)."""
    threads_per_actor: int = Field(1, ge=1)
    readers: int = Field(0, ge=0)
    """Processes, of one CPU each, that read and preprocess anchors for the teachers; others then write the shards, so
    that a teacher only computes. 0: each teacher reads and writes, which is enough if there is little to decode.
    A build without Ray (`workers.num_workers: 0`) has none."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.gpus_per_actor > 1 and not self.gpus_per_actor.is_integer():
            raise ValueError(
                f"gpus_per_actor is {self.gpus_per_actor:g}: specify a fraction of one GPU, or a whole number"
            )
        return self


class CraftConfig(Section):
    """The method: minimise L_task subject to L_ret <= epsilon."""

    enabled: bool = True
    """False is the baseline arm: plain fine-tuning."""
    anchor_cache_dir: FolderPath | None = None
    """Folder that `craft-ray anchors build` wrote: local, on a shared mount, or s3://."""
    anchor_batch_size: int = Field(32, ge=1)
    """Anchors in one retention step, over all workers."""
    anchor_holdout: Fraction = 0.2
    """Fraction of the anchors that training never sees; feasibility is judged on it."""
    retention_freq: int = Field(1, ge=1)
    """K: the retention gradient is computed every K-th step (docs/method.md)."""
    retention_mode: RetentionMode = "hidden"
    """How the loss of the old skill is measured; docs/method.md describes the modes."""
    loss_type: Literal["relative_mse", "mse", "cosine", "l1"] = "relative_mse"
    """Distance of hidden states. `relative_mse` divides by the teacher's mean square, so that epsilon is relative."""
    positions: Positions = None
    """Which of the cache's positions to anchor. Default: `anchors.positions`, or all positions of the cache if the
    config specifies none."""
    layers: Layers = None
    """Which of the cache's layers to anchor. Default: `anchors.layers`, or all layers of the cache if the config has
    no section anchors."""

    initial_lambda: float | None = Field(None, ge=0)
    """λ at the first step. Default: 1; under `keep` `lambda_max`, so that the target is approached from above."""
    lambda_lr: float = Field(0.1, ge=0)
    """Step size of dual ascent on the violation."""
    lambda_max: float = Field(10.0, gt=0)
    lambda_kp: float = Field(0.0, ge=0)
    """Proportional gain in addition to the integral gain `lambda_lr` (a PI controller); 0 is plain dual ascent."""
    lambda_floor: Fraction = 0.35
    """The retention gradient always counts at least this much relative to the task gradient: λ is at least this times
    |g_t|/|g_r|. Below 1 it changes no solution, and training still descends on the task (docs/method.md); 0 lets a
    budget that is met switch retention off."""
    violation: Literal["relative", "absolute"] = "relative"
    """`relative`: mean L_ret / epsilon - 1; `absolute`: mean L_ret - epsilon."""
    violation_clip: float | None = Field(1.0, gt=0)
    """Bound on the size of one violation, so that lambda changes at a bounded rate. None: unbounded."""
    retention_ema: Fraction = 0.9
    """Decay of the running mean of L_ret that the multiplier follows; 0 follows the last value."""

    keep: float | None = Field(None, gt=0, lt=1)
    """Part of the teacher's score on the old skill that must be kept, e.g. 0.95. The budget then follows the score on
    `validation.old`: `epsilon_start` is only the first one (docs/keep.md)."""
    keep_confidence: float = Field(0.8, ge=0.5, lt=1)
    """Confidence of the lower bound of the kept part that must reach `keep` in validations; 0.5 takes the score as it
    is."""

    epsilon_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    epsilon_start: float = Field(0.05, gt=0)
    """The retention budget (at the start, if a schedule tightens it). Only `relative_mse` has a default: what
    fits in another unit depends on the teacher."""
    epsilon_unit: str | None = None
    """What the budget is counted in. Filled in from `retention_mode` and `loss_type`, so that a saved budget is refused
    if they change and the number does not."""
    epsilon_end: float | None = Field(None, gt=0)
    """The budget at the end of the schedule, which is certified. Default: epsilon_start."""
    epsilon_decay: float | None = Field(None, gt=0, le=1)
    """Fraction of the run until epsilon_end is reached, e.g. 0.8, whatever the number of steps. Default: the whole
    run."""
    epsilon_decay_steps: int = Field(0, ge=0)
    """The same as a number of steps; 0 leaves it to `epsilon_decay`. Steps that outlast the run end it at a larger
    budget, which is then the certified one."""

    use_grad_projection: bool = True
    """When the gradients conflict, remove from the task gradient the part that opposes the retention gradient."""
    log_angle: bool = True
    """Log the angle between the gradients (`craft/grad_cos`, `craft/grad_dot`, `craft/conflict`). Without it, without
    the projection and with `lambda_floor: 0`, both losses share one copy of the gradients."""
    retention_grad_dtype: Literal["same", "bfloat16"] = "same"
    """Type in which the retention gradient is kept in addition to the task gradient: that of the weights, or
    `bfloat16`, which takes half of its memory and rounds it once (docs/performance.md)."""
    conflict_measure: Literal["cosine", "dot"] = "cosine"
    """What is compared with `conflict_threshold`: the cosine of the two gradients or, as in earlier scripts, their dot
    product, which has the scale of the gradients (docs/migration.md)."""
    conflict_threshold: float = -0.1
    """The gradients conflict below it; a cosine is between -1 and 1."""
    projection_gate: Literal["always", "violated"] = "violated"
    """`violated` projects only while the mean of L_ret is over the budget (docs/method.md)."""
    projection_mode: Literal["weighted", "equal", "task_priority"] = "weighted"
    """How the gradients are merged: g_t + lambda g_r | (g_t + g_r)/2 | g_t + min(lambda, 1) g_r, where g_r
    counts K times at every K-th step."""

    @field_validator("conflict_threshold")
    @classmethod
    def _of_a_cosine(cls, threshold: float, info: ValidationInfo) -> float:
        if info.data.get("conflict_measure") == "cosine" and not -1 <= threshold <= 1:
            raise ValueError(
                f"{threshold} is compared with a cosine, which is between -1 and 1: specify one in that range, or "
                f"conflict_measure dot"
            )
        return threshold

    @model_validator(mode="before")
    @classmethod
    def _budget_in_its_unit(cls, section: Any) -> Any:
        unit = unit_of(section) if isinstance(section, Mapping) else None
        if unit is None:
            return section
        budget, named = section.get("epsilon_start"), section.get("epsilon_unit")
        if budget is None and unit.default_budget is None:
            raise ValueError(
                f"epsilon_start is missing: this retention loss is counted in {unit.name} ({unit.words}), which has no "
                f"default budget; specify one"
            )
        if budget is not None and named not in (None, unit.name):
            raise ValueError(
                f"epsilon_start {budget} is counted in {named}, but this retention loss in {unit.name} ({unit.words}): "
                f"specify epsilon_start, and epsilon_end where there is one, in {unit.name}"
            )
        return {
            **section,
            "epsilon_start": unit.default_budget if budget is None else budget,
            "epsilon_unit": unit.name,
        }

    @property
    def lambda_start(self) -> float:
        """λ at the first step.

        A part to keep starts with the largest: a skill is lost within a few steps and regained slowly, if at all, while
        a λ that proves too large is divided at the next validation (measured in docs/keep.md)."""
        if self.initial_lambda is not None:
            return self.initial_lambda
        return 1.0 if self.keep is None else self.lambda_max

    @property
    def epsilon_final(self) -> float:
        return self.epsilon_start if self.epsilon_end is None else self.epsilon_end

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epsilon_final > self.epsilon_start:
            raise ValueError(
                f"epsilon_end {self.epsilon_end} is above epsilon_start {self.epsilon_start}: a budget only tightens"
            )
        if self.epsilon_schedule == "constant" and self.epsilon_final != self.epsilon_start:
            raise ValueError(
                f"epsilon_schedule constant has one epsilon, but epsilon_start is {self.epsilon_start} and "
                f"epsilon_end {self.epsilon_end}: leave epsilon_end out or choose linear, cosine or exponential"
            )
        if self.epsilon_decay is not None and self.epsilon_decay_steps:
            raise ValueError(
                f"epsilon_decay {self.epsilon_decay} and epsilon_decay_steps {self.epsilon_decay_steps} both say when "
                f"epsilon_end is reached: leave one of them out"
            )
        if self.lambda_start > self.lambda_max:
            raise ValueError(f"initial_lambda {self.lambda_start} is above lambda_max {self.lambda_max}")
        return self
