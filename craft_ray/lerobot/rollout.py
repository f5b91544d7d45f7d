"""Success in a simulator: episodes of a policy, run side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image

from craft_ray.config import RolloutConfig
from craft_ray.data.frame import Frame
from craft_ray.data.sample import Sample
from craft_ray.errors import ConfigError, DataError
from craft_ray.lerobot.policy import LeRobotPolicy
from craft_ray.models.base import Model
from craft_ray.models.fingerprint import json_fingerprint
from craft_ray.workers import OneWorker, Workers

FILM_PICTURES = 8
FILM_HEIGHT = 128
"""Maximum height of a film's pictures, in pixels."""
NO_CAMERA = (96, 96)
"""Height and width of the pictures in the films of a policy without cameras."""


class Simulation(Protocol):
    """One environment. An episode depends only on its seed."""

    description: str
    """The task in words, as the policy's prompt states it."""
    action_size: int
    max_decisions: int
    """The maximum number of actions in an episode."""
    over: bool
    """Whether the simulator has ended the episode."""

    def reset(self, seed: int) -> None: ...

    def observe(self) -> Frame:
        """The current observation, by the simulator's names."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Execute an action and return whether the task is done."""
        ...

    def close(self) -> None: ...


class Rollouts:
    """The episodes of a configuration."""

    def __init__(self, config: RolloutConfig, key: str) -> None:
        """
        Args:
            key: the section's path in the configuration, for error messages.

        Raises:
            ConfigError: there is no such environment or task.
        """
        self.config = config
        self.name = f"{config.env} {config.task}"
        self._key = key
        self._simulations: list[Simulation] = []
        self._size: tuple[int, int] | None = None
        self._names: dict[str, str] = {}
        if config.env == "metaworld":
            from craft_ray.lerobot.metaworld import check_task

            check_task(config.task, key)
        else:
            from craft_ray.lerobot.gym import check_env

            check_env(config.env, key)

    def __len__(self) -> int:
        return self.config.episodes

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides an episode besides the policy."""
        packages = ("metaworld", "mujoco") if self.config.env == "metaworld" else ("lerobot",)
        versions = {name: version(name) for name in packages}
        return json_fingerprint([self.config.model_dump(mode="json", exclude={"films"}), versions])

    def check(self, model: Model) -> None:
        """Check that the simulator fits a policy; a single camera and a single state match under any names.

        Raises:
            ConfigError: the model is not a policy, or the simulator does not provide its inputs, does not take its
                actions or cannot be created.
        """
        if model.kind != "lerobot":
            raise ConfigError(
                f"{self._key}: only a policy acts in a simulator, but model.kind is {model.kind}: use a policy with "
                f"model.kind=lerobot"
            )
        policy = cast("LeRobotPolicy", model)
        size = cast("tuple[int, int]", policy.features[policy.cameras[0]][1:]) if policy.cameras else NO_CAMERA
        if size != self._size or not self._simulations:
            self.close()
            self._size = size
            self._simulations.append(self._make())
        simulation = self._simulations[0]
        simulation.reset(self.config.seed)
        frame = simulation.observe()
        self._names = self._match(frame, policy)
        self._check_shapes(self._renamed(frame), policy)
        if simulation.action_size != policy.action_size:
            raise ConfigError(
                f"{self._key}: an action has {simulation.action_size} numbers in {self.name}, but the policy "
                f"returns {policy.action_size}: choose the simulator of its robot"
            )
        steps = self.config.max_steps or 1
        if steps > simulation.max_decisions:
            raise ConfigError(
                f"{self._key}: {steps} actions repeated {self.config.action_repeat} times are too many for an episode "
                f"in {self.name}, which has room for {simulation.max_decisions}: lower max_steps or action_repeat"
            )
        if (self.config.execute or 1) > policy.settings.n_action_steps:
            raise ConfigError(
                f"{self._key}.execute is {self.config.execute}, but the policy returns "
                f"{policy.settings.n_action_steps} actions at a time (n_action_steps): execute no more than that"
            )

    def _match(self, frame: Frame, policy: LeRobotPolicy) -> dict[str, str]:
        """A map from the simulator's names to the policy's."""
        shown = [*frame.images, *frame.state]
        for name in self.config.rename:
            if name not in shown:
                raise ConfigError(
                    f"{self._key}.rename: {self.name} does not provide {name}, but {', '.join(shown)}: "
                    f"rename one of those"
                )
        names = dict(self.config.rename)
        for given, wanted in (
            (list(frame.images), policy.cameras),
            (list(frame.state), [name for name in policy.features if name not in policy.cameras]),
        ):
            if len(given) == len(wanted) == 1:
                names.setdefault(given[0], wanted[0])
        known = [names.get(name, name) for name in shown]
        for name in policy.features:
            if known.count(name) != 1:
                raise ConfigError(
                    f"{self._key}: the policy takes {name}, but {self.name} provides {', '.join(shown)}: map exactly "
                    f"one of those to it with rename"
                )
        return names

    def _check_shapes(self, frame: Frame, policy: LeRobotPolicy) -> None:
        for name, wanted in policy.features.items():
            if name in policy.cameras:
                height, width, channels = frame.images[name].shape
                found, matters = (channels, height, width), policy.one_size
            else:
                found, matters = frame.state[name].shape, True
            if matters and found != wanted:
                raise ConfigError(
                    f"{self._key}: {name} is {list(found)} in {self.name}, but the policy takes {list(wanted)}: choose "
                    f"the simulator of its robot"
                )

    def _make(self) -> Simulation:
        assert self._size is not None, "check must be called first"
        config = self.config
        if config.env == "metaworld":
            from craft_ray.lerobot.metaworld import MetaworldSimulation

            return MetaworldSimulation(config.task, *self._size, config.action_repeat)
        from craft_ray.lerobot.gym import GymSimulation

        return GymSimulation(config.env, config.task, self._size, config.action_repeat)

    def close(self) -> None:
        """Release the simulations."""
        while self._simulations:
            self._simulations.pop().close()

    def run(self, model: Model, rows: Sequence[int], workers: Workers | None = None) -> list[dict[str, Any]]:
        """Run these episodes and return their records. A policy's random numbers depend only on the first row.

        Args:
            workers: those that share the policy, if it is sharded: each must run episodes at the same time.

        Raises:
            DataError: the policy returns an action that is not finite.
        """
        policy = cast("LeRobotPolicy", model)
        while len(self._simulations) < len(rows):
            self._simulations.append(self._make())
        episodes = [
            _Episode(simulation, self.config, row) for simulation, row in zip(self._simulations, rows, strict=False)
        ]
        device = [policy.device] if policy.device.type == "cuda" else []
        with torch.random.fork_rng(device):
            torch.manual_seed(self.config.seed + rows[0])
            self._play(policy, episodes, workers if workers is not None and policy.sharded else OneWorker())
        return [episode.record() for episode in episodes]

    def _play(self, policy: LeRobotPolicy, running: Sequence[_Episode], workers: Workers) -> None:
        """Run all episodes to their ends, side by side. A worker whose episodes are over makes the others' passes."""
        samples: list[Sample] = []
        while any(workers.gather(bool(running))):
            if not running:
                policy.act(samples)
                continue
            samples = [Sample(e.id, e.prompt, frame=self._renamed(e.simulation.observe())) for e in running]
            for episode, actions in zip(running, policy.act(samples), strict=True):
                if not np.isfinite(actions).all():
                    raise DataError(
                        f"{self.name}: at step {episode.steps} of {episode.id} the policy returns an action that is "
                        f"not finite: its weights are broken, use another checkpoint"
                    )
                episode.execute(actions[: self.config.execute])
            running = [episode for episode in running if not episode.ended]

    def _renamed(self, frame: Frame) -> Frame:
        images = {self._names.get(name, name): image for name, image in frame.images.items()}
        return Frame(images, {self._names.get(name, name): values for name, values in frame.state.items()})


class _Episode:
    """One episode in progress."""

    def __init__(self, simulation: Simulation, config: RolloutConfig, row: int) -> None:
        self.simulation = simulation
        self.id = f"{config.task}-seed{config.seed + row}"
        self.prompt = config.prompt or simulation.description
        self.steps = 0
        self._most = config.max_steps or simulation.max_decisions
        self._film = Film() if row < config.films else None
        self._success = False
        simulation.reset(config.seed + row)
        self._record_picture()

    @property
    def ended(self) -> bool:
        return self._success or self.simulation.over or self.steps >= self._most

    def execute(self, actions: np.ndarray) -> None:
        """Execute actions [T, D] in order until the episode ends."""
        for action in actions:
            if self.ended:
                return
            self._success = self.simulation.step(action)
            self.steps += 1
            self._record_picture()

    def record(self) -> dict[str, Any]:
        outcome = f"success after {self.steps} steps" if self._success else f"no success in {self.steps} steps"
        record = {
            "id": self.id,
            "prompt": self.prompt,
            "response": "success",
            "prediction": outcome,
            "correct": self._success,
            "steps": self.steps,
        }
        if self._film is not None:
            record["film"] = base64.b64encode(self._film.strip(self.steps, self._picture())).decode()
        return record

    def _record_picture(self) -> None:
        if self._film is not None and self._film.wants(self.steps):
            self._film.add(self.steps, self._picture())

    def _picture(self) -> np.ndarray:
        """The picture of the first camera."""
        return next(iter(self.simulation.observe().images.values()))


class Film:
    """Pictures of an episode of unknown length. When there are many, every second one is dropped, so that the rest stay
    evenly spaced and few are rendered."""

    def __init__(self) -> None:
        self._pictures: dict[int, np.ndarray] = {}
        self._every = 1

    def wants(self, step: int) -> bool:
        return step % self._every == 0

    def add(self, step: int, picture: np.ndarray) -> None:
        self._pictures[step] = picture
        if len(self._pictures) > 4 * FILM_PICTURES:
            self._every *= 2
            self._pictures = {step: kept for step, kept in self._pictures.items() if self.wants(step)}

    def strip(self, step: int, last: np.ndarray) -> bytes:
        """Up to eight pictures side by side as a PNG, evenly spaced, the first and the last of the episode among them.

        Args:
            step: the episode's last step.
        """
        pictures = {**self._pictures, step: last}
        taken = [min(pictures, key=lambda at: abs(at - moment)) for moment in np.linspace(0, step, FILM_PICTURES)]
        strip = Image.fromarray(np.concatenate([pictures[at] for at in dict.fromkeys(taken)], axis=1))
        if strip.height > FILM_HEIGHT:
            strip = strip.resize((round(strip.width * FILM_HEIGHT / strip.height), FILM_HEIGHT))
        buffer = io.BytesIO()
        strip.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()
