"""How a skill is scored, and on which data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field

from craft_ray.config.data import DataConfig
from craft_ray.config.kinds import Kind, without_unused
from craft_ray.config.types import Section, SmallSeed


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
    """How one skill is scored: on held-out samples, or in a simulator."""

    key: ClassVar[str] = "metric"

    metric: str
    """exact_match: the greedy answer equals the response; choice: the response is the likeliest of the choices;
    perplexity: of the response, per token (lower is better); token_accuracy: the fraction of the response's tokens
    that are the likeliest after those before them; success: the fraction of `rollout`'s episodes in which the policy
    succeeds."""
    batch_size: int = Field(64, ge=1)
    """Samples in one forward pass; for rollouts, episodes that run in parallel."""


class SampleEvalSet(ScoredSet):
    """A skill that is scored on held-out samples."""

    tags: ClassVar[tuple[str, ...]] = ("exact_match", "choice", "perplexity", "token_accuracy")
    noun: ClassVar[str] = "held-out samples"

    metric: Literal["exact_match", "choice", "perplexity", "token_accuracy"] = "exact_match"
    data: DataConfig
    max_new_tokens: int = Field(16, ge=1)
    """Longest generated answer, for exact_match and `replies`."""
    replies: int = Field(0, ge=0)
    """For perplexity and token_accuracy: number of samples, from the first, whose greedy answer is generated, too. The
    report shows it beside the response."""

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, besides model and data. Stored scores of teachers are found by it."""
        replies = {"replies": self.replies} if self.replies else {}
        return {"metric": self.metric, "max_new_tokens": self.max_new_tokens, **replies}


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


EVAL_SETS: tuple[type[ScoredSet], ...] = (SampleEvalSet, RolloutEvalSet)


def _with_metric(value: Any) -> Any:
    """A section with its metric, and without unused keys of other metrics."""
    if not isinstance(value, Mapping):
        return value
    tree = {"metric": "exact_match", **value}
    own = next((kind for kind in EVAL_SETS if tree["metric"] in kind.tags), None)
    return tree if own is None else without_unused(tree, own, EVAL_SETS)


EvalSet = Annotated[SampleEvalSet | RolloutEvalSet, Discriminator("metric"), BeforeValidator(_with_metric)]


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
