"""How a skill is scored, and on which data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, field_validator

from craft_ray.config.data import DataConfig
from craft_ray.config.kinds import Kind, without_unused
from craft_ray.config.paths import FolderPath
from craft_ray.config.types import Section, SmallSeed


def _listed(value: Any) -> Any:
    """A single name means a list that holds only it."""
    return [value] if isinstance(value, str) else value


class RolloutConfig(Section):
    """Episodes in a simulator."""

    env: str
    """`metaworld`, or another type of environment that LeRobot knows."""
    task: str
    """The simulator's name of the task, e.g. drawer-close-v3."""
    prompt: str | None = None
    """The instruction to the policy, as its data set words it. Default: the simulator's own."""
    episodes: int = Field(20, ge=1)
    seed: SmallSeed = 0
    """Initial condition of the first episode; the others follow. Choose settings on seeds that are not reported."""
    max_steps: int | None = Field(None, ge=1)
    """Actions after which an episode has failed. Default: equivalent to the simulator's own limit."""
    execute: int | None = Field(None, ge=1)
    """Actions of a chunk that are executed before the next observation. Default: the policy's n_action_steps."""
    action_repeat: int = Field(1, ge=1)
    """How often the simulator repeats an action. It must be what the demonstrations were recorded with."""
    rename: dict[str, str] = {}
    """Maps the simulator's observation names to the policy's."""
    films: int = Field(3, ge=0)
    """Number of episodes for which a film strip is kept."""


class ScoredSet(Kind):
    """How one skill is scored: on held-out samples, by tasks of a harness, or in a simulator."""

    key: ClassVar[str] = "metric"

    metric: str
    """exact_match: the greedy answer equals the response; contains: it contains the response; numeric: their last
    numbers are equal; regex: what `pattern` finds in it equals the response; rouge_l: the longest common subsequence of
    their words, from 0 to 1; function: a function of your own (`MODULE:FUNCTION` is short for it); choice: the response
    is the likeliest of the choices; perplexity: of the response, per token (lower is better); token_accuracy: the
    fraction of the response's tokens that are the likeliest after those before them; lm_eval: tasks of the
    lm-evaluation-harness; success: the fraction of `rollout`'s episodes in which the policy succeeds."""
    batch_size: int = Field(64, ge=1)
    """Samples in one forward pass; for rollouts, episodes that run in parallel."""


class SampleEvalSet(ScoredSet):
    """A skill that is scored on held-out samples."""

    data: DataConfig
    max_new_tokens: int = Field(16, ge=1)
    """Longest generated answer, for the metrics of answers and for `replies`."""

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, besides model and data. Stored scores of teachers are found by it."""
        return self.model_dump(exclude={"data", "batch_size"})


class PlainEvalSet(SampleEvalSet):
    """Held-out samples, scored without further settings."""

    tags: ClassVar[tuple[str, ...]] = ("exact_match", "choice", "contains", "rouge_l")
    noun: ClassVar[str] = "held-out samples"

    metric: Literal["exact_match", "choice", "contains", "rouge_l"] = "exact_match"

    @property
    def decisive(self) -> dict[str, Any]:
        return {"metric": self.metric, "max_new_tokens": self.max_new_tokens}


class LikelihoodEvalSet(SampleEvalSet):
    """Held-out samples, scored by how likely their responses are."""

    tags: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    noun: ClassVar[str] = "held-out samples, scored by likelihood"

    metric: Literal["perplexity", "token_accuracy"]
    replies: int = Field(0, ge=0)
    """Number of samples, from the first, whose greedy answer is also generated. The report shows it next to the
    response."""

    @property
    def decisive(self) -> dict[str, Any]:
        replies = {"replies": self.replies} if self.replies else {}
        return {"metric": self.metric, "max_new_tokens": self.max_new_tokens, **replies}


class NumericEvalSet(SampleEvalSet):
    """Held-out samples whose response is a number, or ends with one."""

    tags: ClassVar[tuple[str, ...]] = ("numeric",)
    noun: ClassVar[str] = "held-out samples with numbers"

    metric: Literal["numeric"]
    tolerance: float = Field(0.0, ge=0)
    """How far the last number of the answer may be from that of the response. 0: it is the same number (0.50 is .5)."""


class RegexEvalSet(SampleEvalSet):
    """Held-out samples whose answers are searched for a pattern."""

    tags: ClassVar[tuple[str, ...]] = ("regex",)
    noun: ClassVar[str] = "held-out samples with a pattern"

    metric: Literal["regex"]
    pattern: str
    """A regular expression as Python writes it. With a group, `the answer is (\\S+)`, what the group first finds in the
    answer must equal the response, or what it finds there; without a group, the pattern must be found in the answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression ({error})") from None
        if groups > 1:
            raise ValueError(
                f"'{pattern}' has {groups} groups, and one is compared: write the others as (?:...), without a number"
            )
        return pattern


class FunctionEvalSet(SampleEvalSet):
    """Held-out samples whose answers are scored by a function of your own."""

    tags: ClassVar[tuple[str, ...]] = ("function",)
    noun: ClassVar[str] = "held-out samples with a function"

    metric: Literal["function"]
    function: str
    """MODULE:FUNCTION, called as `function(reply, response)` or `function(reply, response, row)`. It returns a number
    from 0 to 1, higher is better (docs/evaluation.md)."""
    folder: FolderPath = Field(".", validate_default=True)
    """The folder of the module, if it is not an installed one. Default: the working directory."""

    @field_validator("function")
    @classmethod
    def _named(cls, function: str) -> str:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", function):
            raise ValueError(f"'{function}' names no function: write MODULE:FUNCTION, e.g. my_metrics:score")
        return function

    @property
    def decisive(self) -> dict[str, Any]:
        return self.model_dump(exclude={"data", "batch_size", "folder"})


class HarnessConfig(Section):
    """Tasks of EleutherAI's lm-evaluation-harness; needs the extra `lm-eval` (docs/evaluation.md)."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = Field(
        min_length=1
    )
    """Names of tasks, groups or tags. The score is the mean over the documents of all of them."""
    include_path: FolderPath | None = None
    """A folder with task files of your own. Tasks that are not there are looked up among those of the harness."""
    metric: str | None = None
    """The metric of the tasks that counts, e.g. `acc_norm`; `exact_match,strict-match` also names its filter. It must
    be a mean over the documents, from 0 to 1, where higher is better. Default: the first one of each task."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples in front of each question. Default: what the task says, or none."""
    limit: int | None = Field(None, ge=1)
    """Score only the first documents of each task."""
    folder: FolderPath = Field(".", validate_default=True)
    """Where the relative data paths in task files start. Default: the working directory."""


class HarnessEvalSet(ScoredSet):
    """A skill that is scored by tasks of the lm-evaluation-harness."""

    tags: ClassVar[tuple[str, ...]] = ("lm_eval",)
    noun: ClassVar[str] = "tasks of the lm-evaluation-harness"

    metric: Literal["lm_eval"]
    harness: HarnessConfig

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, besides model and tasks, whose fingerprint has all of theirs."""
        return {"metric": self.metric, "of": self.harness.metric}


class RolloutEvalSet(ScoredSet):
    """A skill that is scored by a policy's episodes in a simulator."""

    tags: ClassVar[tuple[str, ...]] = ("success",)
    noun: ClassVar[str] = "episodes in a simulator"

    metric: Literal["success"] = "success"
    rollout: RolloutConfig

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, besides model and rollout. Stored scores of teachers are found by it;
        the second key dates from when rollouts had it, too."""
        return {"metric": self.metric, "max_new_tokens": 16}


EVAL_SETS: tuple[type[ScoredSet], ...] = (
    PlainEvalSet, LikelihoodEvalSet, NumericEvalSet, RegexEvalSet, FunctionEvalSet, HarnessEvalSet, RolloutEvalSet,
)  # fmt: skip


def _with_metric(value: Any) -> Any:
    """A section with its metric, and without unused keys of other metrics."""
    if not isinstance(value, Mapping):
        return value
    tree = {"metric": "exact_match", **value}
    metric = tree["metric"]
    if isinstance(metric, Mapping) and metric.keys() == {"function"}:
        tree |= {"metric": "function", **metric}
    elif isinstance(metric, str) and ":" in metric:
        tree |= {"metric": "function", "function": metric}
    own = next((kind for kind in EVAL_SETS if tree["metric"] in kind.tags), None)
    return tree if own is None else without_unused(tree, own, EVAL_SETS)


EvalSet = Annotated[
    PlainEvalSet
    | LikelihoodEvalSet
    | NumericEvalSet
    | RegexEvalSet
    | FunctionEvalSet
    | HarnessEvalSet
    | RolloutEvalSet,
    Discriminator("metric"),
    BeforeValidator(_with_metric),
]


class EvaluationConfig(Section):
    """Held-out data of the skill to retain and of the skill to learn."""

    old: EvalSet | None = None
    new: EvalSet | None = None


class ValidationConfig(Section):
    """Held-out data for choosing settings, scored while a run trains. Sweeps are judged by it; keep it separate from
    `evaluation`, or the reported scores are too optimistic."""

    old: EvalSet | None = None
    new: EvalSet | None = None
    every: int = Field(0, ge=0)
    """Steps between validations; 0 validates once, after the last step. Validation does not affect the training."""
