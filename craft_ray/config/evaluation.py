"""How a skill is scored, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field

from craft_ray.config.data import DataConfig
from craft_ray.config.kinds import Kind, without_unused
from craft_ray.config.types import Section


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


class ScoredSet(Kind):
    """How one skill is scored: on held-out samples, or in a simulator."""

    key: ClassVar[str] = "metric"

    metric: str
    """exact_match: greedy answer equals the response; choice: the response is the likeliest of the choices;
    perplexity: of the response, per token (lower is better); success: the part of `rollout`'s episodes that a policy
    ends with success."""
    batch_size: int = Field(64, ge=1)
    """Samples of one forward pass; of rollouts, episodes that go on side by side."""


class SampleEvalSet(ScoredSet):
    """A skill that is scored on held-out samples."""

    tags: ClassVar[tuple[str, ...]] = ("exact_match", "choice", "perplexity")
    noun: ClassVar[str] = "held-out samples"

    metric: Literal["exact_match", "choice", "perplexity"] = "exact_match"
    data: DataConfig
    max_new_tokens: int = Field(16, ge=1)
    """Longest answer that is generated for exact_match."""

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, beside model and data. Kept scores of teachers go by it."""
        return {"metric": self.metric, "max_new_tokens": self.max_new_tokens}


class RolloutEvalSet(ScoredSet):
    """A skill that is scored by a policy's episodes in a simulator."""

    tags: ClassVar[tuple[str, ...]] = ("success",)
    noun: ClassVar[str] = "episodes in a simulator"

    metric: Literal["success"] = "success"
    rollout: RolloutConfig

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a score depends on, beside model and rollout. Kept scores of teachers go by it; the second
        one dates from when rollouts had it, too."""
        return {"metric": self.metric, "max_new_tokens": 16}


EVAL_SETS: tuple[type[ScoredSet], ...] = (SampleEvalSet, RolloutEvalSet)


def _with_metric(value: Any) -> Any:
    """A section with its metric, and without what another metric would go with."""
    if not isinstance(value, Mapping):
        return value
    tree = {"metric": "exact_match", **value}
    own = next((kind for kind in EVAL_SETS if tree["metric"] in kind.tags), None)
    return tree if own is None else without_unused(tree, own, EVAL_SETS)


EvalSet = Annotated[SampleEvalSet | RolloutEvalSet, Discriminator("metric"), BeforeValidator(_with_metric)]


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
