"""The experiment as frozen models: every knob once, with its unit and its default.

`load_config` reads YAML, applies dotted overrides (`craft.lambda_lr=0.05`) and validates once, at the edge.
Nothing here imports torch or ray, so that a mistake is told in milliseconds.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from craft_ray.errors import ConfigError

RetentionMode = Literal["hidden", "token_ce"]
ARMS = ("baseline", "token_ce", "hidden")
MOST_VARIANTS = 4
"""What a report can still tell apart by colours."""
Precision = Literal["fp32", "bf16"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

BOUND = re.compile(r"\s*(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
SQLITE = "sqlite:///"
OBJECTS = "s3://"
POSITIONS = ("vision_mean", "text_last", "masked_mean", "first_token", "last_token", "all", "every_N", "suffix")


def _position(name: str) -> str:
    if (name in POSITIONS and name != "every_N") or re.fullmatch(r"every_[1-9]\d*", name):
        return name
    raise ValueError(f"'{name}' is no anchor position; the positions are {', '.join(POSITIONS)} (N a number)")


def _bound(text: Any) -> Any:
    if isinstance(text, str) and BOUND.fullmatch(text):
        return text
    raise ValueError(f"'{text}' is no bound: write '>= 0.95' or '<= 0.05'")


def _episodes(value: Any) -> Any:
    """Numbers, or ranges such as "0-39", as numbers. (YAML reads 0:40 as minutes and seconds.)"""
    numbers: list[Any] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        part = re.fullmatch(r"(\d+)-(\d+)", item) if isinstance(item, str) else None
        if isinstance(item, str) and (part is None or int(part[1]) > int(part[2])):
            raise ValueError(f"'{item}' is no range of episodes: write the first and the last, e.g. 0-39")
        numbers += [item] if part is None else range(int(part[1]), int(part[2]) + 1)
    return numbers


def _distinct(items: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if items is not None and (not items or len(set(items)) != len(items)):
        raise ValueError(f"{list(items)} must name each entry once, and at least one")
    return items


def _workers(value: Any) -> Any:
    """A number of workers, or the least and the most."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if not all(type(number) is int for number in pair) or len(pair) != 2:
        raise ValueError(f"{value!r} is no number of workers: write e.g. 2, or [1, 2] for the least and the most")
    least, most = pair
    if pair is value and not 1 <= least <= most:
        raise ValueError(
            f"[{least}, {most}] is no range of workers: write the least, from 1, and the most, e.g. [1, 2]"
        )
    if least < 0:
        raise ValueError(f"{value} is no number of workers: write 0 to train in this process, or 1 and more")
    return value


def _variant(name: str) -> str:
    if name in ARMS:
        raise ValueError(f"'{name}' is an arm: a variant needs another name")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"'{name}' is no name of a variant: write small letters, digits and _, a letter first")
    return name


def _place(text: str | None) -> str | None:
    """A path or a hub name as it is; of an object store one that holds neither settings nor secrets."""
    if text is None or "://" not in text:
        return text
    if not text.startswith(OBJECTS):
        raise ValueError(f"'{text}' is no place that is known: name a path (of a mount, too) or {OBJECTS}BUCKET/KEY")
    if re.search(r"[?@]", text) or not re.match(rf"{OBJECTS}[^/]+", text):
        raise ValueError(
            f"'{text.split('@')[-1]}' has to be {OBJECTS}BUCKET/KEY alone: credentials, region and endpoint come from "
            f"the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)"
        )
    return text.rstrip("/")


Position = Annotated[str, AfterValidator(_position)]
PlaceName = Annotated[str, AfterValidator(_place)]
"""A path on a disk or a shared mount, or `s3://bucket/key`; for models and data a hub name, too."""
VariantName = Annotated[str, AfterValidator(_variant)]
Positions = Annotated[tuple[Position, ...] | None, AfterValidator(_distinct)]
Bound = Annotated[str, BeforeValidator(_bound)]
Episodes = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None,
    AfterValidator(_distinct),
    BeforeValidator(lambda value: None if value is None else _episodes(value)),
]
Layers = Annotated[tuple[int, ...] | None, AfterValidator(_distinct)]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The model: the teacher before fine-tuning, the student after."""

    kind: Literal["vision_language", "causal_lm", "lerobot"] = "causal_lm"
    """`vision_language` loads AutoModelForImageTextToText, `causal_lm` loads AutoModelForCausalLM, `lerobot` a policy
    of LeRobot with its processors (docs/lerobot.md; needs the extra `lerobot`)."""
    path: PlaceName
    """A folder (local, of a shared mount, or s3://) or a hub name."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Keep float32 for training; `train.precision` chooses the type of the arithmetic."""
    max_length: int = Field(512, ge=2)
    """Longest sequence in tokens, images and suffix included. A longer sample is an error, never a cut. A policy of
    LeRobot has limits of its own (`tokenizer_max_length`, `max_action_tokens`), which are kept to as strictly."""
    chat_template: bool = False
    """Format prompts with the model's own chat template."""
    append_eos: bool = True
    """Whether a response ends with the end-of-sequence token. Off for running text."""
    disable_dropout: bool = True
    """Anchors compare student and teacher; dropout would be counted as forgetting."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    merge_statistics: tuple[PlaceName, ...] = ()
    """LeRobotDatasets (folders or hub names) whose statistics widen those of a policy's normaliser. By default the
    teacher's own stay as they are, whatever the new data are."""


class Columns(Section):
    """Names of the columns of a data source. A column that is not named is not read."""

    id: str | None = None
    """Unique name of a sample; the row number where it is not named."""
    image: str | None = None
    """A path, encoded bytes (PNG, JPEG), a `{bytes, path}` pair or an array of uint8 (height, width[, channel])."""
    prompt: str | None = "prompt"
    """What the model is given."""
    response: str | None = None
    """What the model shall answer. Anchors need none."""
    choices: str | None = None
    """The answers among which `metric: choice` decides."""
    answer_index: str | None = None
    """Which of the choices is right, from 0; in place of a response."""

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.answer_index is not None and self.response is not None:
            raise ValueError(
                f"response '{self.response}' and answer_index '{self.answer_index}' both say what is right: name one "
                f"of them"
            )
        if self.answer_index is not None and self.choices is None:
            raise ValueError(f"answer_index '{self.answer_index}' counts choices: name their column under choices, too")
        return self


class DataConfig(Section):
    """A place that samples are read from."""

    path: PlaceName
    """A file, a folder, a glob pattern of text files (local, of a shared mount, or s3://), or a hub name."""
    format: Literal["auto", "jsonl", "parquet", "dataset", "text", "lerobot"] = "auto"
    """`auto` goes by the ending: .jsonl/.json, .parquet, .txt/.md/.py; a folder with meta/info.json is a
    LeRobotDataset; otherwise a Hugging Face dataset. For a LeRobotDataset on the hub say `lerobot`."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    columns: Columns = Columns()
    limit: int | None = Field(None, ge=1)
    """Read only the first rows."""
    episodes: Episodes = None
    """Episodes of a LeRobotDataset: numbers, or ranges such as `0-39`. Default: all."""
    stride: int = Field(1, ge=1)
    """Take every N-th frame of a LeRobotDataset."""
    rename: dict[str, str] = {}
    """Names of a LeRobotDataset's features to the policy's, e.g. `{observation.images.top:
    observation.images.base_0_rgb}`."""
    chunk_chars: int = Field(512, ge=1)
    """Length of a chunk of a plain text file, in characters. A text source has the one column `text`."""


class AnchorsConfig(Section):
    """What the teacher is run over, and what of it is kept."""

    source: DataConfig
    modes: Annotated[tuple[RetentionMode, ...], AfterValidator(_distinct)] = ("hidden", "token_ce")
    """`hidden` stores hidden states, `token_ce` the teacher's own greedily generated suffix tokens."""
    positions: Positions = None
    """Token positions whose hidden states are kept. Default: `suffix` for vision-language models, `all` for
    language models, which measured best (docs/anchors.md)."""
    layers: Annotated[tuple[int, ...], AfterValidator(_distinct)] = (-2, -1)
    """Indices into the hidden states: 0 is the embeddings, k the output of block k, the last one after the final
    norm. Negative ones count from the end."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage type. float16 refuses values that overflow."""
    max_new_tokens: int = Field(16, ge=1)
    """Longest suffix that the teacher generates."""
    suffix_from: Literal["teacher", "response"] = "teacher"
    """Suffix tokens are the teacher's own, or the data's responses."""
    batch_size: int = Field(32, ge=1)
    """Samples in one forward pass of the teacher, where samples are padded."""
    pack_tokens: int | None = Field(None, ge=0)
    """Tokens of one forward pass in which prompts of a language model stand end to end, without padding; 0 pads.
    Default: 2048 for a model that can be packed. The numbers are the same."""
    rows_per_shard: int = Field(1024, ge=1)
    """Rows of a shard: the unit of work, and of what is redone after an interruption."""
    actors: int = Field(1, ge=1)
    """Teachers that run at once."""
    cpus_per_actor: float = Field(1.0, ge=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    """Graphics processors of one teacher; a fraction shares one."""
    threads_per_actor: int = Field(1, ge=1)


class CraftConfig(Section):
    """The method: minimise L_task subject to L_ret <= epsilon."""

    enabled: bool = True
    """Off is the baseline arm: plain fine-tuning."""
    anchor_cache_dir: PlaceName | None = None
    """Folder that `craft-ray anchors build` wrote: local, of a shared mount, or s3://."""
    anchor_batch_size: int = Field(32, ge=1)
    """Anchors in one retention step, over all workers."""
    anchor_holdout: Fraction = 0.2
    """Part of the anchors that training never sees; feasibility is judged on it."""
    retention_freq: int = Field(1, ge=1)
    """K: the retention gradient is taken every K-th step (docs/method.md)."""
    retention_mode: RetentionMode = "hidden"
    loss_type: Literal["relative_mse", "mse", "cosine", "l1"] = "relative_mse"
    """Distance of hidden states. `relative_mse` divides by the teacher's mean square, so that epsilon is relative."""
    positions: Positions = None
    """Which of the cache's positions to anchor. Default: `anchors.positions`, or all that the cache holds where the
    config names none."""
    layers: Layers = None
    """Which of the cache's layers to anchor. Default: `anchors.layers`, or all that the cache holds where the config
    has no section anchors."""

    initial_lambda: float = Field(1.0, ge=0)
    lambda_lr: float = Field(0.1, ge=0)
    """Step of dual ascent on the violation."""
    lambda_max: float = Field(10.0, gt=0)
    lambda_kp: float = Field(0.0, ge=0)
    """Proportional gain beside the integral `lambda_lr` (a PI controller); 0 is plain dual ascent."""
    violation: Literal["relative", "absolute"] = "relative"
    """`relative`: mean L_ret / epsilon - 1; `absolute`: mean L_ret - epsilon."""
    violation_clip: float | None = Field(1.0, gt=0)
    """Bound on the size of one violation, so that lambda moves at a bounded rate. None: unbounded."""
    retention_ema: Fraction = 0.9
    """Decay of the running mean of L_ret that the multiplier follows; 0 follows the last value."""

    epsilon_schedule: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    epsilon_start: float = Field(0.05, gt=0)
    """The retention budget (at the start, where a schedule tightens it)."""
    epsilon_end: float | None = Field(None, gt=0)
    """The budget at the end of the schedule, which is the one that is certified. Default: epsilon_start."""
    epsilon_decay_steps: int = Field(0, ge=0)
    """Steps until epsilon_end is reached; 0 is the whole run."""

    use_grad_projection: bool = True
    """Remove from the task gradient what opposes the retention gradient, when they conflict."""
    conflict_threshold: float = Field(-0.1, ge=-1, le=1)
    """Cosine below which the gradients conflict."""
    projection_gate: Literal["always", "violated"] = "violated"
    """`violated` projects only while the mean of L_ret is over the budget (docs/method.md)."""
    projection_mode: Literal["weighted", "equal", "task_priority"] = "weighted"
    """How gradients merge: g_t + lambda g_r | (g_t + g_r)/2 | g_t + min(lambda, 1) g_r."""

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
        if self.initial_lambda > self.lambda_max:
            raise ValueError(f"initial_lambda {self.initial_lambda} is above lambda_max {self.lambda_max}")
        return self


class TrainConfig(Section):
    """The optimisation. AdamW over all trainable parameters."""

    steps: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)
    """Samples of one step, over all workers and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches whose gradients make one step."""
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Norm that the merged gradient is clipped to; None clips nothing."""
    precision: Precision = "fp32"
    """Arithmetic of the forward passes; bf16 is autocast, weights and losses stay in float32."""
    log_every: int = Field(1, ge=1)
    """Steps between lines of the log. Losses are looked at this often, and a non-finite one stops the run."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 writes one at the end."""
    keep_checkpoints: int = Field(2, ge=0)
    """Latest checkpoints that stay on disk; 0 saves none, not even at the end."""
    prefetch: int = Field(2, ge=1)
    """Batches that are made ready ahead of the step."""


class RolloutConfig(Section):
    """Episodes in a simulator."""

    env: str
    """`metaworld`, or another type of environment that LeRobot knows."""
    task: str
    """The simulator's name of the task, e.g. drawer-close-v3."""
    prompt: str | None = None
    """What the policy is told to do: the words of its data set. Default: the simulator's own."""
    episodes: int = Field(20, ge=1)
    seed: int = Field(0, ge=0)
    """Initial condition of the first episode; the others follow. Choose settings on other seeds than are reported."""
    max_steps: int | None = Field(None, ge=1)
    """Actions after which an episode has failed. Default: what the simulator's own limit comes to."""
    execute: int | None = Field(None, ge=1)
    """Actions of a chunk that are carried out before the policy looks again. Default: the policy's n_action_steps."""
    action_repeat: int = Field(1, ge=1)
    """Times that the simulator repeats an action. It has to be what the demonstrations were recorded with."""
    rename: dict[str, str] = {}
    """Names of the simulator's observations to the policy's."""
    films: int = Field(3, ge=0)
    """Episodes of which a film strip is kept."""


class EvalSet(Section):
    """How one skill is scored: on held-out samples, or in a simulator."""

    data: DataConfig | None = None
    rollout: RolloutConfig | None = None
    metric: Literal["exact_match", "choice", "perplexity", "success"] = "exact_match"
    """exact_match: greedy answer equals the response; choice: the response is the likeliest of the choices;
    perplexity: of the response, per token (lower is better); success: the part of `rollout`'s episodes that a policy
    ends with success."""
    batch_size: int = Field(64, ge=1)
    """Samples of one forward pass; of rollouts, episodes that go on side by side."""
    max_new_tokens: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = "rollout" if self.metric == "success" else "data"
        for name, value in (("data", self.data), ("rollout", self.rollout)):
            if (value is not None) != (name == needed):
                raise ValueError(f"metric {self.metric} goes with a section {needed}, and no other")
        return self


class EvaluationConfig(Section):
    """Held-out data of the skill to keep and of the skill to learn."""

    old: EvalSet | None = None
    new: EvalSet | None = None


class ValidationConfig(Section):
    """Held-out data that settings are chosen on, looked at while a run trains. What a sweep is judged by; keep it apart
    from `evaluation`, or the reported scores flatter."""

    old: EvalSet | None = None
    new: EvalSet | None = None
    every: int = Field(0, ge=0)
    """Steps between looks; 0 looks once, after the last step. Looking changes nothing in the training."""


class WorkersConfig(Section):
    """Processes of a run."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    """Workers of Ray Train; 0 trains in this process, without a cluster. Two numbers, e.g. `[1, 2]`, are the least and
    the most: training goes on with what is left where a node is lost, and grows again (docs/faults.md)."""
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Further resources of Ray that a worker takes; with `use_gpu` a part of a GPU, e.g. `{GPU: 0.5}`."""
    threads: int = Field(1, ge=1)
    """Threads of torch in each worker, where it computes on processors."""
    max_failures: int = Field(2, ge=0)
    """Times that workers are started again because one was lost; the run goes on from its last checkpoint."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        gpus = self.resources_per_worker.get("GPU")
        if gpus is None:
            return self
        if not self.use_gpu:
            raise ValueError(
                f"resources_per_worker takes {gpus:g} GPU, which use_gpu=false would leave idle: set use_gpu"
            )
        if gpus == 0 or (gpus > 1 and not gpus.is_integer()):
            raise ValueError(f"resources_per_worker takes {gpus:g} GPU: name a part of one, or whole ones")
        return self

    @property
    def least(self) -> int:
        """Workers that a run needs."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that a run takes where the cluster has room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def count(self) -> str:
        """The number of workers in words."""
        return f"{self.least} to {self.most}" if self.elastic else str(self.most)


class CompareConfig(Section):
    """The three arms and variants of them on one cache, over seeds."""

    arms: Annotated[tuple[str, ...] | None, AfterValidator(_distinct)] = None
    """Which of `baseline`, `token_ce`, `hidden` and the variants run. Default: all."""
    seeds: Annotated[tuple[int, ...], AfterValidator(_distinct)] = (0, 1, 2)
    parallel: int | None = Field(None, ge=1)
    """Runs at once, each with a model of its own in memory. Default: as many as the cluster holds."""
    token_ce: dict[str, Any] = {}
    """`craft` settings of the token_ce arm where they differ, e.g. `{epsilon_start: 0.1}`: nats, not squares."""
    variants: Annotated[dict[VariantName, dict[str, Any]], Field(max_length=MOST_VARIANTS)] = {}
    """Further constrained arms by name, each with the `craft` settings in which it differs from the config, e.g.
    `{hidden_prefix: {retention_mode: hidden, positions: [vision_mean, text_last]}}`."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The arms and variants that run."""
        return (*ARMS, *self.variants) if self.arms is None else self.arms

    def craft_settings(self, arm: str) -> dict[str, Any]:
        """What makes an arm or variant out of the config's section `craft`."""
        if arm == "baseline":
            return {"enabled": False}
        if arm in self.variants:
            return {"enabled": True, **self.variants[arm]}
        return {"enabled": True, "retention_mode": arm, **(self.token_ce if arm == "token_ce" else {})}


class ObjectiveConfig(Section):
    """What a sweep searches for, over any logged metric (docs/sweeps.md)."""

    maximize: str | None = None
    minimize: str | None = None
    """Name either of them: `new/score`, `new/ratio`, `train/loss`, ..."""
    subject_to: dict[str, Bound] = {}
    """Bounds, e.g. `{old/ratio: ">= 0.95"}`. A setting within all bounds ranks above every setting that is not."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """With several seeds a bound has to be kept by the one-sided confidence bound of the mean at this level."""

    @property
    def metric(self) -> str:
        metric = self.minimize if self.maximize is None else self.maximize
        assert metric is not None
        return metric

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("name one metric, either under maximize or under minimize")
        return self


class SweepConfig(Section):
    """How a sweep searches. What it searches over is a file of its own (`--space`)."""

    samples: int = Field(16, ge=1)
    """Settings that are tried; for each point of the grid, where the space has one."""
    sampler: Literal["random", "tpe"] = "random"
    """`tpe` is Optuna's tree-structured Parzen estimator with constraints; it learns from the trials before."""
    seed: int = Field(0, ge=0)
    """Of the sampler: the same seed draws the same settings."""
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    """Which trials are stopped early (asha, median), or go on from a better one's weights (pbt)."""
    grace: int = Field(1, ge=1)
    """Looks at the validation data before a trial may be stopped, or between two changes by pbt."""
    reduction_factor: int = Field(3, ge=2)
    """One in so many trials goes on past each rung of asha."""
    repeat: int = Field(1, ge=1)
    """Seeds of each setting; it is ranked by their mean."""
    parallel: int | None = Field(None, ge=1)
    """Trials at once. Default: as many as the cluster holds."""
    max_failures: int = Field(1, ge=0)
    """Times that a crashed trial is tried again before it is marked as failed. One that is lost with its node is always
    tried again."""


class TrackingConfig(Section):
    """Where numbers go beside the run folder. TensorBoard events are always written."""

    mlflow: str | None = None
    """MLflow's tracking URI, e.g. `sqlite:///mlflow.db`. Needs the extra `mlflow`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; `offline` writes files for `wandb sync`. Needs the extra `wandb`."""
    project: str = "craft-ray"
    """The experiment of MLflow, the project of Weights & Biases."""

    @model_validator(mode="after")
    def _without_secrets(self) -> Self:
        if self.mlflow is not None and re.search(r"://[^/\s]*@", self.mlflow):
            raise ValueError(
                "mlflow holds a password, and a config is written into every run folder: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class Experiment(Section):
    """One experiment: everything that decides its numbers, and where it runs."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    """Part of the names of run directories: letters, digits, `_`, `-` and `.`."""
    variant: VariantName | None = None
    """What this run's arm is called where it is a variant of a comparison; `craft-ray compare` sets it."""
    seed: int = Field(0, ge=0)
    output_dir: PlaceName = "runs"
    """Folder that run directories are made in: local, of a shared mount, or s3://."""
    model: ModelConfig
    task: DataConfig
    """Training data of the new skill."""
    anchors: AnchorsConfig | None = None
    craft: CraftConfig = CraftConfig()
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    compare: CompareConfig = CompareConfig()
    objective: ObjectiveConfig | None = None
    sweep: SweepConfig = SweepConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def arm(self) -> str:
        """What runs are compared by: `baseline`, or the name of the variant, or the retention mode."""
        return (self.variant or self.craft.retention_mode) if self.craft.enabled else "baseline"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_batches()
        self._check_arms()
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} is more than train.steps {self.train.steps}"
            )
        return self

    def _check_batches(self) -> None:
        """A global batch is the same for any number of workers that a run may have, so it divides over each."""
        workers, accumulate = self.workers, self.train.accumulate
        batches = {"train.batch_size": self.train.batch_size}
        if self.craft.enabled:
            batches["craft.anchor_batch_size"] = self.craft.anchor_batch_size
        for key, size in batches.items():
            for number in range(workers.least, workers.most + 1):
                if size % (max(number, 1) * accumulate):
                    within = f" (of {workers.count})" if workers.elastic else ""
                    raise ValueError(
                        f"{key} {size} does not divide over {number} workers{within} times {accumulate} micro-batches"
                    )

    def _check_arms(self) -> None:
        """Arms that are chosen exist, and the settings of each make one."""
        known = (*ARMS, *self.compare.variants)
        for arm in self.compare.chosen:
            if arm not in known:
                raise ValueError(f"compare.arms: '{arm}' is no arm and no variant; there are {', '.join(known)}")
        for arm, own in {"token_ce": self.compare.token_ce, **self.compare.variants}.items():
            where = f"compare.{arm}" if arm in ARMS else f"compare.variants.{arm}"
            if "anchor_cache_dir" in own:
                raise ValueError(f"{where}.anchor_cache_dir cannot be changed: all arms read one cache")
            for key in ("enabled", "retention_mode") if arm in ARMS else ("enabled",):
                if key in own:
                    raise ValueError(f"{where}.{key} is what makes the arm, it cannot be changed")
            try:
                CraftConfig.model_validate({**self.craft.model_dump(), **self.compare.craft_settings(arm)})
            except ValidationError as error:
                told = "; ".join(_explain({**e, "loc": ("craft", *e["loc"])}) for e in error.errors())
                raise ValueError(f"{where}: {told}") from None

    def changed(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with values at dotted keys changed, validated again."""
        tree = self.model_dump()
        for key, value in changes.items():
            _set(tree, key, value)
        return parse_config(tree, "command line")


def load_config(path: str | Path, overrides: Sequence[str] = (), base: Path | None = None) -> Experiment:
    """The experiment in a YAML file with `key=value` overrides. Paths in it become absolute.

    Args:
        base: the folder that relative paths start from; the working directory where it is None.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value is out of range.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}: name a YAML file") from None
    except OSError as error:
        raise ConfigError(f"the config {path} does not open ({error.strerror}): name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, a config is a mapping of sections")
    for key, value in parse_overrides(overrides).items():
        _set(tree, key, value)
    return parse_config(tree, str(path), base)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as values by dotted key.

    Raises:
        ConfigError: one has no key, or its value is no YAML.
    """
    changes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is no override: write key=value, e.g. craft.lambda_lr=0.05")
        try:
            changes[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"the value of '{override}' is no YAML") from None
    return changes


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML would drop the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        YAMLError: it is none, or names a key twice.
    """
    return yaml.load(text, _Loader)


def parse_config(tree: dict[str, Any], where: str, base: Path | None = None) -> Experiment:
    """A mapping as an experiment, every mistake in one line that names `where` and the key."""
    try:
        return absolute(Experiment.model_validate(tree), base or Path.cwd())
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def absolute(config: Experiment, base: Path) -> Experiment:
    """The same experiment with local paths absolute: workers have another working directory."""
    tree = config.model_dump()

    def fix(section: dict[str, Any], key: str, always: bool = False) -> None:
        value = section[key]
        if value is None:
            return
        if value.startswith(OBJECTS):
            return
        path = base / Path(value).expanduser()
        if always or value.startswith(("~", "./", "../")) or path.exists() or glob.glob(str(path)):
            section[key] = os.path.normpath(path.absolute())

    fix(tree, "output_dir", always=True)
    fix(tree["model"], "path")
    merged = {str(number): path for number, path in enumerate(tree["model"]["merge_statistics"])}
    for number in merged:
        fix(merged, number)
    tree["model"]["merge_statistics"] = tuple(merged.values())
    fix(tree["task"], "path")
    tracked = tree["tracking"]["mlflow"]
    if tracked is not None and tracked.startswith(SQLITE) and not tracked.startswith(SQLITE + "/"):
        tree["tracking"]["mlflow"] = SQLITE + os.path.abspath(base / tracked.removeprefix(SQLITE))
    fix(tree["craft"], "anchor_cache_dir", always=True)
    if tree["anchors"]:
        fix(tree["anchors"]["source"], "path")
    for held_out in ("validation", "evaluation"):
        for skill in ("old", "new"):
            if tree[held_out][skill] and tree[held_out][skill]["data"]:
                fix(tree[held_out][skill]["data"], "path")
    return Experiment.model_validate(tree)


def dump_config(config: Experiment) -> str:
    """The resolved experiment as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} is no section")
    tree[leaf] = value


def _explain(error: Any) -> str:
    """One pydantic error as `key: what is wrong`, with a guess where a key is misspelt."""
    location = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _fields(location[:-1]), 1, 0.5)
        guess = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"unknown key {key}{guess}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        message += f" (it is {error['input']!r})"
    return f"{key}: {message}" if key else message


def _fields(location: Sequence[str]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = Experiment
    for part in location:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
        if section is None:
            return []
    return list(section.model_fields)
