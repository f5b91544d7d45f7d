"""How a skill is scored, and on what."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from craft_ray.config.data import DataConfig
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
