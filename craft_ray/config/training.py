"""The optimisation, and the processes that it runs in."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from craft_ray.config.search import ObjectiveConfig
from craft_ray.config.types import Fraction, Precision, Section, workers

PRESET = ("learning_rate", "schedule", "warmup_steps", "weight_decay", "betas", "max_grad_norm")
"""What `optimizer: policy` takes from the policy."""


class TrainConfig(Section):
    """The optimisation. AdamW over all trainable parameters."""

    steps: int = Field(ge=1)
    batch_size: int = Field(32, ge=1)
    """Samples in one step, over all workers and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches whose gradients are accumulated for one step."""
    pack: bool = False
    """Lay the task samples of a micro-batch end to end, without padding, for a language model that supports it as a
    teacher does (`anchors.pack_tokens`). The loss is the same; samples of different lengths take less time. Not with
    gradient checkpointing, compiled layers or sharding."""
    optimizer: Literal["adamw", "adamw_8bit", "policy"] = "adamw"
    """`adamw` is AdamW with the keys below; `adamw_8bit` keeps its two moments in 8 bits by blocks of 256
    (arXiv 2110.02861; needs the extra `8bit`). `policy` is what a LeRobot policy's own config says: its optimiser
    (Adam or AdamW), learning rate and schedule, weight decay, betas, epsilon and clipping; their keys
    are then left out here (docs/lerobot.md)."""
    learning_rate: float = Field(1e-4, gt=0)
    mask_loss_above: float | None = Field(None, gt=0)
    """Response tokens whose loss under the teacher is above this many nats are not learnt (arXiv 2501.14315); a
    response keeps at least its likeliest token. It costs one pass of the teacher over the task's data before the first
    step, and after each resume."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Norm to which the merged gradient is clipped; None: no clipping."""
    precision: Precision = "fp32"
    """Arithmetic of the forward passes; bf16 is autocast, weights and losses stay in float32."""
    log_every: int = Field(1, ge=1)
    """Steps between log lines. Losses are checked this often, and a non-finite one stops the run."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 writes them by time, and one at the end."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes after which a checkpoint is written although none is due by steps, so that no more work is lost; 0 writes
    none by time. If checkpoints take long to write, they are further apart: they take 5 % of the time at most."""
    checkpoint_async: bool = False
    """Train on while a checkpoint of a sharded run is written: its tensors are first copied to the host, which takes
    their size there. The last one is waited for."""
    keep_checkpoints: int = Field(2, ge=0)
    """Number of latest checkpoints that are kept; 0 saves none, not even at the end."""
    keep_best: ObjectiveConfig | None = None
    """Which checkpoint is the run's model: that of the best validation, e.g. `{maximize: new/score, subject_to:
    {old/ratio: ">= 0.95"}}`, over what validations measure (docs/keep_best.md). Default: the last one."""
    patience: int = Field(0, ge=0)
    """Validations in a row, none of them better than the best of `keep_best`, after which the run ends; 0 never ends it
    early."""
    prefetch: int = Field(2, ge=1)
    """Batches that are prepared ahead of the step."""
    loader_workers: int = Field(0, ge=0)
    """Processes of each worker that preprocess samples and anchors for these batches, where decoding images takes
    longer than a step; 0 leaves it to a thread. The numbers are the same. A stream is preprocessed by the thread."""
    check_minutes: float = Field(5.0, ge=0)
    """All rows of the task, of each held-out set and, at the build of a cache, of the anchors are preprocessed once
    before the first step, so that a bad row is found then. Longest time for one source, in minutes; the next start on
    the same data checks the rest. 0 checks none."""

    @model_validator(mode="after")
    def _one_optimizer(self) -> Self:
        own = [key for key in PRESET if getattr(self, key) != type(self).model_fields[key].default]
        if self.optimizer == "policy" and own:
            raise ValueError(
                f"{own[0]} is {getattr(self, own[0])}, but optimizer policy takes it from the policy's own config: "
                f"leave it out, or set optimizer=adamw"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written says nothing that is not used."""
        tree: dict[str, Any] = dump(self)
        return {key: value for key, value in tree.items() if self.optimizer != "policy" or key not in PRESET}


class WorkersConfig(Section):
    """Processes of a run."""

    num_workers: Annotated[int | tuple[int, int], BeforeValidator(workers)] = 1
    """Workers of Ray Train; 0 trains in this process, without a cluster. Two numbers, e.g. `[1, 2]`, are a minimum and
    a maximum: training continues with the remaining workers if a node is lost, and grows again (docs/faults.md)."""
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Additional Ray resources of a worker; with `use_gpu` also a fraction of a GPU, e.g. `{GPU: 0.5}`."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """Whether every worker holds the whole model (`none`) or its part of weights, gradients and moments, by FSDP2:
    `full` shards over all workers, `hybrid` over each group of `shards` workers, between which the groups hold copies
    (docs/scaling.md). A number of workers and a sharding can be changed when a run is resumed."""
    shards: int = Field(0, ge=0)
    """Workers that hold one copy of the model together with sharding `hybrid`: those of one machine, best."""
    threads: int = Field(1, ge=1)
    """Torch threads of each worker if it computes on CPUs."""
    max_failures: int = Field(2, ge=0)
    """How often the workers are restarted because one was lost; the run resumes from its last checkpoint."""

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.sharding == "none":
            if self.shards:
                raise ValueError(
                    f"shards {self.shards} is for sharding hybrid, it is none: set it, or leave shards out"
                )
            return self
        if self.least < 2:
            raise ValueError(
                f"sharding {self.sharding} shares a model between workers, and num_workers is {self.count}: set it to "
                f"2 or more, or sharding=none"
            )
        if self.sharding == "full":
            if self.shards:
                raise ValueError(
                    f"shards {self.shards} is for sharding hybrid, it is full: set it, or leave shards out"
                )
            return self
        for number in range(self.least, self.most + 1):
            if self.shards < 2 or number % self.shards or number == self.shards:
                raise ValueError(
                    f"sharding hybrid makes groups of shards={self.shards} workers out of num_workers={self.count}: "
                    f"set shards to 2 or more, and num_workers to a multiple of it; for a single group set "
                    f"sharding=full"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        gpus = self.resources_per_worker.get("GPU")
        if gpus is None:
            return self
        if not self.use_gpu:
            raise ValueError(
                f"resources_per_worker takes {gpus:g} GPU, which use_gpu=false would leave idle: set use_gpu=true"
            )
        if gpus == 0 or (gpus > 1 and not gpus.is_integer()):
            raise ValueError(f"resources_per_worker takes {gpus:g} GPU: specify a fraction of one, or a whole number")
        return self

    @property
    def least(self) -> int:
        """The minimum number of workers of a run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """The number of workers of a run if the cluster has room."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        return self.least < self.most

    @property
    def count(self) -> str:
        """The number of workers in words."""
        return f"{self.least} to {self.most}" if self.elastic else str(self.most)
