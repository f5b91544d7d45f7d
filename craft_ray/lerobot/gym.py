"""Any environment that LeRobot knows, through LeRobot's own factory."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import preprocess_observation

from craft_ray.data.frame import Frame
from craft_ray.errors import ConfigError

PICTURES = "observation.image"


def check_env(env: str, task: str, key: str) -> None:
    """
    Raises:
        ConfigError: LeRobot has no such type of environment.
    """
    known = sorted({"metaworld", *EnvConfig.get_known_choices()})
    if env not in known:
        raise ConfigError(f"{key}.env is {env}, LeRobot knows {', '.join(known)}")


class GymSimulation:
    """One environment of LeRobot's."""

    def __init__(self, env: str, task: str, action_repeat: int = 1, config: Any = None) -> None:
        """
        Args:
            config: LeRobot's own configuration of the environment, in place of its defaults.

        Raises:
            ConfigError: its package is not installed, or there is no such task.
        """
        self._repeat = action_repeat
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                settings = config or make_env_config(env, task=task)
                suites = make_env(settings, n_envs=1)
                self._before, _ = settings.get_env_processors()
            self._env = next(iter(next(iter(suites.values())).values()))
            self._observed, _ = self._env.reset(seed=[0])
        except Exception as error:  # a simulator raises anything
            raise ConfigError(
                f"the environment {env} with task {task} cannot be made ({type(error).__name__}: "
                f"{(str(error).strip() or '-').splitlines()[0]}): install its package, or choose another task"
            ) from None
        self.description: str = self._describe(task)
        self.max_decisions = int(self._env.call("_max_episode_steps")[0]) // action_repeat

    def _describe(self, task: str) -> str:
        for name in ("task_description", "task"):
            with contextlib.suppress(AttributeError):
                return str(self._env.call(name)[0])
        return task

    def reset(self, seed: int) -> None:
        self._observed, _ = self._env.reset(seed=[seed])

    def observe(self) -> Frame:
        seen = self._before(preprocess_observation(self._observed))
        images, state = {}, {}
        for name, tensor in seen.items():
            if not name.startswith("observation."):
                continue
            array = tensor[0].numpy()
            if name.startswith(PICTURES):  # LeRobot has made numbers from 0 to 1 of the pixels, channels first
                images[name] = np.ascontiguousarray((array.transpose(1, 2, 0) * 255).round().astype(np.uint8))
            else:
                state[name] = array.astype(np.float32)
        return Frame(images, state)

    def step(self, action: np.ndarray) -> bool:
        for _ in range(self._repeat):
            self._observed, _, ended, _, info = self._env.step(action[None])
            if _succeeded(info):
                return True
            if ended[0]:
                return False
        return False


def _succeeded(info: dict[str, Any]) -> bool:
    """Whether the one episode of a vector of environments has ended with success, wherever gymnasium puts that."""
    found = info.get("final_info", info).get("is_success", False)
    return bool(np.asarray(found).reshape(-1)[0])
