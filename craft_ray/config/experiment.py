"""A whole experiment, and how it is made from a tree of values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from craft_ray.config.about import AboutConfig
from craft_ray.config.adapter import AdapterConfig
from craft_ray.config.arms import CATALOGUE
from craft_ray.config.comparison import CompareConfig
from craft_ray.config.evaluation import EvaluationConfig, ValidationConfig
from craft_ray.config.mistakes import explain
from craft_ray.config.mixture import TaskConfig
from craft_ray.config.model import ModelConfig
from craft_ray.config.modes import RETENTION_MODES, OldData
from craft_ray.config.overrides import apply_changes
from craft_ray.config.paths import FolderPath
from craft_ray.config.retention import AnchorsConfig, CraftConfig
from craft_ray.config.search import ObjectiveConfig, SweepConfig
from craft_ray.config.skills import SkillConfig, SkillName, batch_sizes, check_sources
from craft_ray.config.tracking import TrackingConfig
from craft_ray.config.training import TrainConfig, WorkersConfig
from craft_ray.config.types import ARMS, Section, Seed, VariantName
from craft_ray.errors import ConfigError


class Experiment(Section):
    """One experiment: everything that decides its numbers, and where it runs."""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    """Part of the run directories' names: letters, digits, `_`, `-` and `.`."""
    variant: VariantName | None = None
    """Name of this run's arm if it is a variant of a comparison; `craft-ray compare` sets it."""
    seed: Seed = 0
    output_dir: FolderPath = Field("runs", validate_default=True)
    """Folder in which run directories are created: local, on a shared mount, or s3://."""
    model: ModelConfig
    adapter: AdapterConfig | None = None
    """An adapter to train in place of all weights."""
    task: TaskConfig
    """Training data of the new skill: a source, or a `mix` of several by weight (docs/data.md)."""
    anchors: AnchorsConfig | None = None
    skills: dict[SkillName, SkillConfig] = {}
    """Several old skills by name, each with a budget and a multiplier (docs/skills.md). Without this section there is
    one."""
    craft: CraftConfig = CraftConfig()
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    about: AboutConfig = AboutConfig()
    compare: CompareConfig = CompareConfig()
    objective: ObjectiveConfig | None = None
    sweep: SweepConfig = SweepConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def arm(self) -> str:
        """The arm of the comparison: the name of the variant, or the retention mode, or `baseline`."""
        return self.variant or (self.craft.retention_mode if self.craft.enabled else "baseline")

    @property
    def run_name(self) -> str:
        """The name of the run's folder. What trains an adapter does not share it with what trains all weights."""
        adapter = "" if self.adapter is None else f"-{self.adapter.kind}"
        return f"{self.name}-{self.arm}{adapter}-seed{self.seed}"

    @property
    def old_data(self) -> OldData:
        """What training needs of the old skill."""
        if not self.craft.enabled:
            return "none"
        facts = RETENTION_MODES[self.craft.retention_mode]
        answered = self.anchors is not None and self.anchors.suffix_from == "response"
        return "labelled" if answered and "suffix" in facts.stores else facts.old_data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_batches()
        self._check_arms()
        self._check_adapter()
        self._check_skills()
        self._check_keep()
        self._check_best()
        self._check_sharding()
        self._check_model()
        if self.train.optimizer == "policy" and self.model.kind != "lerobot":
            raise ValueError(
                f"train.optimizer policy is for a LeRobot policy, which brings one, and model.kind is "
                f"{self.model.kind}: set train.optimizer=adamw"
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} is more than train.steps {self.train.steps}"
            )
        return self

    def _check_batches(self) -> None:
        """Check that a global batch divides over every number of workers that a run may have."""
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

    def _check_skills(self) -> None:
        """Check that each old skill has anchors in one place, anchors in a batch, and held-out data of its own."""
        if self.anchors is not None:
            check_sources(self.skills, self.anchors.source)
        if not self.skills:
            return
        batch_sizes(self.skills, self.craft.anchor_batch_size)
        for section, old in (("validation", self.validation.old), ("evaluation", self.evaluation.old)):
            if old is not None:
                raise ValueError(
                    f"{section}.old scores one old skill, and there is a section skills: move it to "
                    f"skills.{next(iter(self.skills))}.{section}"
                )

    def kept_parts(self) -> dict[str | None, float]:
        """What part of the teacher's score must be kept, by skill; None is the key of the one skill of a config
        without names. Skills that have only an epsilon are left out, and plain fine-tuning keeps nothing."""
        return self.stated_parts() if self.craft.enabled else {}

    def stated_parts(self) -> dict[str | None, float]:
        """What the config states as the parts to keep, whether or not its training is held to them."""
        if not self.skills:
            return {} if self.craft.keep is None else {None: self.craft.keep}
        parts = {name: self.craft.keep if skill.keep is None else skill.keep for name, skill in self.skills.items()}
        return {name: keep for name, keep in parts.items() if keep is not None}

    @property
    def validates_both(self) -> bool:
        """Whether validations score an old skill and the new one, so that the one can be weighed against the other."""
        old = [self.validation.old, *(skill.validation for skill in self.skills.values())]
        return self.validation.new is not None and any(found is not None for found in old)

    def keep_key(self, skill: str | None) -> str:
        """The key that says what part of a skill must be kept."""
        return "craft.keep" if skill is None or self.skills[skill].keep is None else f"skills.{skill}.keep"

    def _check_keep(self) -> None:
        """Check that a stated part of an old skill is measured while the run trains."""
        for name, keep in self.kept_parts().items():
            key = self.keep_key(name)
            where = "validation.old" if name is None else f"skills.{name}.validation"
            if (self.validation.old if name is None else self.skills[name].validation) is None:
                raise ValueError(f"{key} {keep} is measured on validation data of the old skill: add {where}")
            if self.craft.epsilon_schedule != "constant":
                raise ValueError(
                    f"{key} {keep} moves epsilon by what validations measure, and craft.epsilon_schedule is "
                    f"{self.craft.epsilon_schedule}: leave one of them out"
                )
            if not 0 < self.validation.every < self.train.steps:
                raise ValueError(
                    f"{key} {keep} moves the budget at each validation, and validation.every is "
                    f"{self.validation.every} in a run of {self.train.steps} steps: set it to e.g. "
                    f"{max(self.train.steps // 10, 1)}"
                )

    def _check_best(self) -> None:
        """Check that a run that keeps its best checkpoint has several to choose from."""
        train, every = self.train, self.validation.every
        if train.keep_best is None:
            if train.patience:
                raise ValueError(
                    f"train.patience {train.patience} counts validations that are not better, and nothing says what "
                    f"better is: add train.keep_best, e.g. {{maximize: new/score}}"
                )
            return
        if not 0 < every < train.steps:
            raise ValueError(
                f"train.keep_best chooses among validations, and validation.every is {every} in a run of "
                f"{train.steps} steps: set it to e.g. {max(train.steps // 10, 1)}"
            )
        if not train.keep_checkpoints:
            raise ValueError("train.keep_best keeps a checkpoint, and train.keep_checkpoints is 0: set it to 1 or more")

    def _check_arms(self) -> None:
        """Check that the chosen arms exist and that the settings of each are valid."""
        known = tuple(dict.fromkeys((*self.compare.own, *CATALOGUE)))
        for arm in self.compare.chosen:
            if arm not in known and self.compare.chosen != ("all",):
                raise ValueError(f"compare.arms: '{arm}' is no arm and no variant; there are {', '.join(known)}")
        for arm in self.compare.learning_rates:
            if arm not in known or self._interpolates(arm):
                raise ValueError(f"compare.learning_rates: '{arm}' is no arm that trains")
        for arm, own in {"token_ce": self.compare.token_ce, **self.compare.variants}.items():
            where = f"compare.{arm}" if arm in ARMS else f"compare.variants.{arm}"
            if "anchor_cache_dir" in own:
                raise ValueError(f"{where}.anchor_cache_dir cannot be changed: all arms read one cache")
            for key in ("enabled", "retention_mode", "train", "interpolate") if arm in ARMS else ():
                if key in own:
                    raise ValueError(f"{where}.{key} is what makes the arm, it cannot be changed")
            self._check_interpolation(where, own)
            train = own.get("train", {})
            if not isinstance(train, Mapping):
                raise ValueError(f"{where}.train is {train!r}: give settings of the section train")
            if "steps" in train or "precision" in train:
                raise ValueError(
                    f"{where}.train changes {'steps' if 'steps' in train else 'precision'}, which all arms "
                    f"of a comparison share"
                )
            settings = {**self.craft.model_dump(), **self.compare.craft_settings(arm, self.craft)}
            if settings["epsilon_start"] is None:
                settings["epsilon_start"] = 1.0  # an arm without a budget is a mistake only where it is compared
            if not isinstance(own.get("adapter", {}), Mapping | None):
                raise ValueError(
                    f"{where}.adapter is {own['adapter']!r}: give settings of the section adapter, or null"
                )
            adapter = self.compare.adapter_settings(arm, self.adapter)
            training = {**self.train.model_dump(), **train}
            sections: tuple[tuple[str, type[Section], Mapping[str, Any] | None], ...] = (
                ("craft", CraftConfig, settings),
                ("adapter", AdapterConfig, adapter),
                ("train", TrainConfig, training),
            )
            for name, section, tree in sections:
                if tree is not None:
                    _check_section(name, section, tree, where)

    def _interpolates(self, arm: str) -> bool:
        return "interpolate" in {**CATALOGUE, **self.compare.variants}.get(arm, {})

    def _check_interpolation(self, where: str, own: Mapping[str, Any]) -> None:
        """Check that a variant of interpolated runs has runs to interpolate, and nothing else."""
        source = own.get("interpolate")
        if source is None:
            return
        known = [arm for arm in (*self.compare.own, *CATALOGUE) if not self._interpolates(arm)]
        if source not in known:
            raise ValueError(f"{where}.interpolate: '{source}' is no arm that trains; there are {', '.join(known)}")
        if len(own) > 1:
            raise ValueError(
                f"{where} interpolates the runs of {source} and trains nothing, so it has no other settings"
            )

    def _check_adapter(self) -> None:
        if self.adapter is not None and self.adapter.dropout and self.model.disable_dropout:
            raise ValueError(
                f"adapter.dropout is {self.adapter.dropout:g}, but model.disable_dropout turns dropout off, because "
                f"anchors compare student and teacher: leave it out, or set model.disable_dropout=false"
            )

    def _check_model(self) -> None:
        """Check what only some models support."""
        model = self.model
        for key in ("attention", "compile"):
            if model.kind == "lerobot" and getattr(model, key):
                raise ValueError(
                    f"model.{key} is {getattr(model, key)}, but model.kind is lerobot: its policies call parts of "
                    f"their layers directly, with an attention of their own; leave it out"
                )
        if model.kind == "lerobot" and self.anchors is not None and self.anchors.gpus_per_actor > 1:
            raise ValueError(
                f"anchors.gpus_per_actor is {self.anchors.gpus_per_actor:g}, but model.kind is lerobot, and a policy "
                f"is not spread over several GPUs: set it to 1"
            )
        if model.kind == "lerobot" and self.train.mask_loss_above is not None:
            raise ValueError(
                f"train.mask_loss_above is {self.train.mask_loss_above:g}, but model.kind is lerobot: it masks tokens "
                f"of text; leave it out"
            )
        if self.train.pack:
            self._check_packed()
        if model.attention == "flash_attention_2" and (model.dtype, self.train.precision) == ("float32", "fp32"):
            raise ValueError(
                "model.attention is flash_attention_2, which computes in bfloat16, but train.precision is fp32: set "
                "train.precision=bf16, or model.attention=sdpa"
            )

    def _check_packed(self) -> None:
        """Check that task samples can be packed."""
        model, sharding = self.model, self.workers.sharding
        conflicts = {
            f"model.kind is {model.kind}, and only a language model (causal_lm) is packed": model.kind != "causal_lm",
            "model.gradient_checkpointing is true, which computes layers again outside of the packed pass": (
                model.gradient_checkpointing
            ),
            "model.compile is true, which would compile each pack anew": model.compile,
            "model.disable_dropout is false, and packed attention has no dropout": not model.disable_dropout,
            f"workers.sharding is {sharding}, which packs are not supported with": sharding != "none",
        }
        for conflict, there in conflicts.items():
            if there:
                raise ValueError(f"train.pack is true, but {conflict}: change that, or set train.pack=false")

    def _check_sharding(self) -> None:
        """Check that what is trained can be sharded."""
        sharding = f"workers.sharding is {self.workers.sharding}"
        if self.workers.sharding == "none":
            if self.train.checkpoint_async:
                raise ValueError(
                    "train.checkpoint_async is true, but workers.sharding is none: only the checkpoints of sharded "
                    "runs are written beside training; leave it out, or set workers.sharding=full"
                )
            return
        for key in ("use_dora", "modules_to_save") if self.adapter is not None else ():
            if getattr(self.adapter, key):
                raise ValueError(
                    f"{sharding}, but adapter.{key} reads whole weights of the frozen model, which are shared out: "
                    f"leave it out, or set workers.sharding=none"
                )
        if self.adapter is not None and self.train.checkpoint_async:
            raise ValueError(
                "train.checkpoint_async is true, but there is an adapter, whose checkpoints are small and written by "
                "one worker: leave it out"
            )
        if self.train.optimizer == "adamw_8bit" or self.model.compile:
            what = "model.compile is true" if self.model.compile else "train.optimizer is adamw_8bit"
            raise ValueError(
                f"{sharding}, but {what}, and only one of the two is supported: leave it out, or set "
                f"workers.sharding=none"
            )
        if self.model.kind == "lerobot" and self.model.dtype != "float32":
            raise ValueError(
                f"{sharding}, but model.dtype is {self.model.dtype}, beside which a LeRobot policy keeps its norms and "
                f"its vision in float32, and weights of one type alone are gathered together: set model.dtype=float32 "
                f"and train.precision=bf16"
            )
        if self.train.keep_best is not None:
            raise ValueError(
                f"{sharding}, but train.keep_best goes back to the model of an earlier step, and sharded checkpoints "
                f"have one at the last step alone; leave train.keep_best out, or set workers.sharding=none"
            )
        if self.train.mask_loss_above is not None:
            raise ValueError(
                f"{sharding}, but train.mask_loss_above lets the teacher score the samples by worker: set "
                f"workers.sharding=none, or leave it out"
            )

    def changed(self, changes: Mapping[str, Any]) -> Experiment:
        """A copy with values at dotted keys changed, validated again; without changes, the same."""
        if not changes:
            return self
        tree = self.model_dump()
        apply_changes(tree, changes)
        return parse_config(tree, "command line")


def _check_section(name: str, section: type[Section], tree: Mapping[str, Any], where: str) -> None:
    try:
        section.model_validate(tree)
    except ValidationError as error:
        reasons = "; ".join(explain({**e, "loc": (name, *e["loc"])}, Experiment) for e in error.errors())
        raise ValueError(f"{where}: {reasons}") from None


def parse_config(tree: dict[str, Any], where: str, base: Path | None = None) -> Experiment:
    """Validate a mapping as an experiment; all mistakes are in one line that names `where` and the key.

    Args:
        base: the folder that relative paths start from; None means the working directory.
    """
    try:
        return Experiment.model_validate(tree, context={"base": base or Path.cwd()})
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(explain(e, Experiment) for e in error.errors())) from None
