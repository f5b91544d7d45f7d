"""Any environment that LeRobot knows, through LeRobot's own factory."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import os
import sys
import weakref
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import preprocess_observation
from lerobot.utils.constants import ACTION
from lerobot.utils.import_utils import register_third_party_plugins

from craft_ray.data.frame import Frame
from craft_ray.errors import ConfigError, first_line
from craft_ray.quiet import without_prints

if sys.platform == "linux":
    os.environ.setdefault(
        "MUJOCO_GL", "egl"
    )  # without a screen; the first import of mujoco decides for the whole process

PICTURES = "observation.image"


def check_env(env: str, key: str) -> None:
    """
    Raises:
        ConfigError: LeRobot has no such type of environment.
    """
    register_third_party_plugins()
    known = sorted(EnvConfig.get_known_choices())
    if env not in known:
        near = difflib.get_close_matches(env, known, 3)
        raise ConfigError(
            f"{key}.env is {env}, but LeRobot has no such environment: choose one of {', '.join(near or known)}"
        )


class GymSimulation:
    """One of LeRobot's environments."""

    def __init__(
        self,
        env: str,
        task: str,
        size: tuple[int, int] | None = None,
        action_repeat: int = 1,
        config: EnvConfig | None = None,
    ) -> None:
        """
        Args:
            task: as the environment names it; a task of a suite is written SUITE/NUMBER.
            size: height and width of the pictures, if the environment lets them be chosen.
            config: LeRobot's own configuration of the environment, in place of its defaults.

        Raises:
            ConfigError: its package is not installed, there is no such task, or there are several.
        """
        self._repeat = action_repeat
        try:
            with without_prints():
                settings = config or _settings(env, task, size)
                found = [made for suite in make_env(settings, n_envs=1).values() for made in suite.values()]
                self._before, self._after = settings.get_env_processors()
                if len(found) == 1:
                    self._observed, _ = found[0].reset(seed=[0])  # some are created only now
        except Exception as error:  # a simulator may raise any exception
            raise ConfigError(
                f"the environment {env} with task {task} cannot be created ({type(error).__name__}: "
                f"{first_line(error)}): install its package, or choose another task"
            ) from None
        if len(found) != 1:
            raise ConfigError(f"{env} has {len(found)} tasks in {task}: specify one of them, as in {task}/0")
        self._env = found[0]
        atexit.register(
            _close, weakref.ref(self)
        )  # runs before the driver's own handler, which the first picture registered
        self.description = self._describe()
        self.action_size: int = self._env.single_action_space.shape[0]
        self.max_decisions = int(self._env.call("_max_episode_steps")[0]) // action_repeat
        self.over = False
        """Whether the environment has ended the episode."""

    def _describe(self) -> str:
        """The task in words, from the same attributes as in LeRobot's own evaluation."""
        for name in ("task_description", "task"):
            with contextlib.suppress(AttributeError, NotImplementedError):
                return str(self._env.call(name)[0])
        return ""

    def reset(self, seed: int) -> None:
        """Start an episode; the environment derives the initial condition from the seed."""
        self.over = False
        self._observed, _ = self._env.reset(seed=[seed])

    def observe(self) -> Frame:
        """What a policy sees now, by LeRobot's names."""
        seen = self._before(preprocess_observation(self._observed))
        images, state = {}, {}
        for name, tensor in seen.items():
            if not name.startswith("observation.") or not isinstance(tensor, torch.Tensor):
                continue
            array = tensor[0].numpy()
            if name.startswith(PICTURES):  # LeRobot has scaled the pixels to [0, 1], channels first
                images[name] = np.ascontiguousarray((array.transpose(1, 2, 0) * 255).round().astype(np.uint8))
            else:
                state[name] = array.astype(np.float32)
        return Frame(images, state)

    def step(self, action: np.ndarray) -> bool:
        """Execute one decision, float32 [D], and return whether the task is done."""
        assert not self.over, "the environment has started another episode by itself"
        done = self._after({ACTION: torch.from_numpy(action)[None]})[ACTION].numpy()
        for _ in range(self._repeat):
            self._observed, _, terminated, truncated, info = self._env.step(done)
            self.over = bool(terminated[0] or truncated[0])
            if "final_obs" in info:  # the observation is already the start of the next episode
                self._observed = _batch_of_one(info["final_obs"][0])
            if _succeeded(info):
                return True
            if self.over:
                return False
        return False

    def close(self) -> None:
        """Release the environment. A second call does nothing."""
        self._env.close()


def _settings(env: str, task: str, size: tuple[int, int] | None) -> EnvConfig:
    """LeRobot's configuration of an environment."""
    suite, _, number = task.rpartition("/")
    chosen: dict[str, Any] = {"task": task}
    if suite and number.isdigit():
        chosen = {"task": suite, "task_ids": [int(number)]}
    if size is not None:
        known = {field.name for field in fields(EnvConfig.get_choice_class(env))}
        sizes = {"observation_height": size[0], "observation_width": size[1]}
        chosen |= {name: pixels for name, pixels in sizes.items() if name in known}
    settings: EnvConfig = make_env_config(env, **chosen)
    return settings


def _close(simulation: weakref.ref[GymSimulation]) -> None:
    found = simulation()
    if found is not None:
        found.close()


def _batch_of_one(observed: Any) -> Any:
    if isinstance(observed, dict):
        return {name: _batch_of_one(part) for name, part in observed.items()}
    return np.asarray(observed)[None]


def _succeeded(info: dict[str, Any]) -> bool:
    """Whether the only episode of a vector environment has ended with success, wherever gymnasium reports that."""
    found = info.get("final_info", info).get("is_success", False)
    return bool(np.asarray(found).reshape(-1)[0])
