"""Success in a simulator: episodes of a policy, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from craft_ray.config import RolloutConfig
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.models.base import Model
from craft_ray.models.fingerprint import json_fingerprint

FILM_PICTURES = 8


class Simulation(Protocol):
    """One environment. An episode is decided by its seed alone."""

    description: str
    """The task in words, as the policy is told it."""
    max_decisions: int

    def reset(self, seed: int) -> None: ...

    def observe(self) -> Frame:
        """What there is to see now, by the simulator's names."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Carry out an action, and tell whether the task is done."""
        ...


class Rollouts:
    """The episodes of a configuration."""

    def __init__(self, config: RolloutConfig, key: str) -> None:
        """
        Args:
            key: the section's place in the configuration, for errors.

        Raises:
            ConfigError: there is no such environment or task.
        """
        self.config = config
        self.name = f"{config.env} {config.task}"
        self._key = key
        self._simulations: list[Simulation] = []
        self._names: dict[str, str] = {}
        if config.env == "metaworld":
            from craft_ray.lerobot.metaworld import check_task

            check_task(config.task, key)
        else:
            from craft_ray.lerobot.gym import check_env

            check_env(config.env, config.task, key)

    def __len__(self) -> int:
        return self.config.episodes

    @property
    def fingerprint(self) -> str:
        return json_fingerprint(self.config.model_dump(mode="json", exclude={"films"}))

    def check(self, model: Model) -> None:
        """Whether the simulator shows what a policy looks at; one camera and one state match under any names.

        Raises:
            ConfigError: the model is no policy, or something that it looks at is not there.
        """
        if model.kind != "lerobot":
            raise ConfigError(f"{self._key}: only a policy acts in a simulator, model.kind is {model.kind}")
        policy = cast("LeRobotPolicy", model)
        if not self._simulations:
            self._simulations.append(self._make(policy))
        simulation = self._simulations[0]
        simulation.reset(self.config.seed)
        frame = simulation.observe()
        self._names = dict(self.config.rename)
        for shown, wanted in (
            (list(frame.images), policy.cameras),
            (list(frame.state), [name for name in policy.features if name not in policy.cameras]),
        ):
            if len(shown) == len(wanted) == 1:
                self._names.setdefault(shown[0], wanted[0])
        given = {self._names.get(name, name) for name in (*frame.images, *frame.state)}
        missing = [name for name in policy.features if name not in given]
        if missing:
            raise ConfigError(
                f"{self._key}: the policy looks at {missing[0]}, {self.name} shows "
                f"{', '.join((*frame.images, *frame.state))}: map one to the other with rename"
            )
        for name, values in frame.state.items():
            size = policy.features[self._names.get(name, name)]
            if values.shape != size:
                raise ConfigError(
                    f"{self._key}: {name} has {values.shape[0]} numbers in {self.name}, the policy takes {size[0]}: choose "
                    f"the simulator of its robot"
                )

    def _make(self, policy: LeRobotPolicy) -> Simulation:
        height, width = policy.features[policy.cameras[0]][1:]
        if self.config.env == "metaworld":
            from craft_ray.lerobot.metaworld import MetaworldSimulation

            return MetaworldSimulation(self.config.task, height, width, self.config.action_repeat)
        from craft_ray.lerobot.gym import GymSimulation

        return GymSimulation(self.config.env, self.config.task, self.config.action_repeat)

    def run(self, model: Model, rows: Sequence[int]) -> list[dict[str, Any]]:
        """
        Raises:
            DataError: the policy returns something that is no number.
        """
        policy = cast("LeRobotPolicy", model)
        while len(self._simulations) < len(rows):
            self._simulations.append(self._make(policy))
        episodes = [
            _Episode(simulation, self.config, row) for simulation, row in zip(self._simulations, rows, strict=False)
        ]
        going = episodes
        while going:
            frames = [episode.look() for episode in going]
            samples = [
                Sample("", e.simulation.description, frame=self._renamed(f)) for e, f in zip(going, frames, strict=True)
            ]
            for episode, actions in zip(going, policy.act(samples), strict=True):
                if not np.isfinite(actions).all():
                    raise DataError(
                        f"the policy returns an action that is no number in {self.name}: its weights are broken"
                    )
                episode.carry_out(actions[: self.config.execute])
            going = [episode for episode in going if not episode.ended]
        return [episode.record() for episode in episodes]

    def _renamed(self, frame: Frame) -> Frame:
        images = {self._names.get(name, name): image for name, image in frame.images.items()}
        return Frame(images, {self._names.get(name, name): values for name, values in frame.state.items()})


class _Episode:
    """One episode on its way."""

    def __init__(self, simulation: Simulation, config: RolloutConfig, row: int) -> None:
        self.simulation = simulation
        self._seed = config.seed + row
        self._task = config.task
        self._most = config.max_steps or simulation.max_decisions
        self._filmed = row < config.films
        self._pictures: list[np.ndarray] = []
        self._steps = 0
        self._success = False
        simulation.reset(self._seed)

    @property
    def ended(self) -> bool:
        return self._success or self._steps >= self._most

    def look(self) -> Frame:
        frame = self.simulation.observe()
        if self._filmed:
            self._pictures.append(next(iter(frame.images.values())))
        return frame

    def carry_out(self, actions: np.ndarray) -> None:
        for action in actions:
            if self.ended:
                return
            self._success = self.simulation.step(action)
            self._steps += 1

    def record(self) -> dict[str, Any]:
        told = f"success after {self._steps} actions" if self._success else f"no success in {self._steps} actions"
        record = {
            "id": f"{self._task}-seed{self._seed}",
            "prompt": self.simulation.description,
            "response": "success",
            "prediction": told,
            "correct": self._success,
            "steps": self._steps,
        }
        if self._filmed:
            self.look()
            record["film"] = base64.b64encode(film_strip(self._pictures)).decode()
        return record


def film_strip(pictures: Sequence[np.ndarray]) -> bytes:
    """Up to eight pictures side by side as a PNG, evenly spaced, the first and the last among them."""
    count = min(FILM_PICTURES, len(pictures))
    chosen = np.linspace(0, len(pictures) - 1, count).round().astype(int)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([pictures[i] for i in chosen], axis=1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
