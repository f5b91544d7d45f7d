"""Episodes in a simulator depend on their seeds alone, equal LeRobot's own, and are scored fairly."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco reads it when LeRobot's environments import it

pytest.importorskip("lerobot")
pytest.importorskip("metaworld")

import gymnasium as gym
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.envs.configs import EnvConfig
from lerobot.envs.metaworld import MetaworldEnv
from lerobot.scripts import lerobot_eval
from PIL import Image

from craft_ray.config import AutoData, ModelConfig, RolloutConfig, dump_config, parse_config
from craft_ray.data.sample import Sample
from craft_ray.data.source import open_source
from craft_ray.errors import ConfigError, DataError
from tests.support.robots import small_policy, write_dataset

try:
    from craft_ray.lerobot.metaworld import PICTURE, STATE, MetaworldSimulation

    _simulation = MetaworldSimulation("drawer-close-v3", 32, 32)
    _simulation.reset(0)
    _simulation.observe()
except ConfigError as error:
    pytest.skip(error.message, allow_module_level=True)

from craft_pipelines import cli

from craft_ray.lerobot.demonstrations import write_demonstrations
from craft_ray.lerobot.gym import GymSimulation
from craft_ray.lerobot.rollout import Film, Rollouts
from craft_ray.lerobot.size import sized
from craft_ray.models import load_model
from craft_ray.run.folder import RunFolder

TASK = "button-press-topdown-v3"
REPEAT = 6


def rollouts(**changes: Any) -> Rollouts:
    settings = {"env": "metaworld", "task": TASK, "episodes": 3, "action_repeat": REPEAT, "films": 1, **changes}
    return Rollouts(RolloutConfig.model_validate(settings), "evaluation.old.rollout")


class Expert:
    """A policy that acts as the script does in the episodes of `seeds`.

    It acts on the frame alone: the script runs in a simulation of its own, and its action at each picture is stored.
    """

    kind = "lerobot"
    one_size = False
    device = torch.device("cpu")

    def __init__(self, seeds: Sequence[int], chunk: int = 2, size: int = 32) -> None:
        self.settings = SimpleNamespace(n_action_steps=chunk)
        self.features: dict[str, tuple[int, ...]] = {
            "observation.images.top": (3, size, size),
            "observation.state": (4,),
        }
        self.cameras = ["observation.images.top"]
        self.action_size = 4
        self.seen: list[int] = []
        self._known: dict[bytes, np.ndarray] = {}
        own = MetaworldSimulation(TASK, size, size, REPEAT)
        for seed in seeds:
            own.reset(seed)
            states, actions = [], []
            for _ in range(25):
                states.append(own.observe().images[PICTURE].tobytes())
                actions.append(own.expert())
                if own.step(actions[-1]):
                    break
            for moment, state in enumerate(states):
                following = [*actions[moment:], *[actions[-1]] * chunk][:chunk]
                self._known[state] = np.stack(following)

    def act(self, samples: Sequence[Sample]) -> np.ndarray:
        self.seen.append(len(samples))
        frames = [sample.frame for sample in samples]
        return np.stack([self._known[f.images["observation.images.top"].tobytes()] for f in frames if f is not None])


class Still(Expert):
    """A policy that returns one number."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__(())
        self.value = value

    def act(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.full((len(samples), 2, 4), self.value, np.float32)


def scored(episodes: Rollouts, policy: Any, batch_size: int) -> list[dict[str, Any]]:
    episodes.check(policy)
    rows = range(len(episodes))
    return [
        record
        for start in range(0, len(rows), batch_size)
        for record in episodes.run(policy, rows[start : start + batch_size])
    ]


# -- Meta-World


def first_frame(simulation: MetaworldSimulation, seed: int) -> tuple[bytes, bytes]:
    simulation.reset(seed)
    frame = simulation.observe()
    return frame.images[PICTURE].tobytes(), frame.state[STATE].tobytes()


@pytest.mark.parametrize("task", ["drawer-close-v3", "door-open-v3"])
def test_an_episode_starts_as_its_seed_says_whatever_ran_before(task: str) -> None:
    used = MetaworldSimulation(task, 48, 32)
    first = first_frame(used, 7)
    for _ in range(20):
        used.step(used.expert())
    other = first_frame(used, 8)
    assert other[0] != first[0]
    assert first_frame(used, 7) == first
    assert first_frame(MetaworldSimulation(task, 48, 32), 8) == other


def test_an_episode_is_the_one_that_lerobots_environment_shows() -> None:
    theirs, mine = (
        MetaworldEnv(TASK),
        MetaworldSimulation(TASK, 32, 32),
    )
    theirs._ensure_env()
    theirs._env.seed(5)
    raw, _ = theirs._env.reset(seed=5)
    mine.reset(5)
    assert np.array_equal(mine._observed, raw)
    for _ in range(500):
        action = mine.expert()
        raw, _, _, _, info = theirs._env.step(action)
        done = mine.step(action)
        assert np.array_equal(mine._observed, raw)
        assert done == bool(info["success"])
        if done:
            return
    pytest.fail("the expert does not solve its task")


def test_pictures_are_upright_and_have_the_requested_size() -> None:
    theirs = MetaworldEnv(TASK)
    theirs._ensure_env()
    theirs._env.seed(5)
    theirs._env.reset(seed=5)
    mine = MetaworldSimulation(TASK, 48, 48)
    mine.reset(5)
    picture = mine.observe().images[PICTURE]
    assert picture.shape == (48, 48, 3)
    assert picture.dtype == np.uint8
    reference = np.asarray(Image.fromarray(np.ascontiguousarray(theirs.render())).resize((48, 48))).astype(float)

    def likeness(other: np.ndarray) -> float:
        return float(np.corrcoef(other.ravel().astype(float), reference.ravel())[0, 1])

    turned = [picture[::-1], picture[:, ::-1], picture[::-1, ::-1]]
    assert likeness(picture) > 0.8  # theirs has shadows
    assert likeness(picture) > max(map(likeness, turned)) + 0.1


def test_nothing_is_rendered_before_it_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    simulation = MetaworldSimulation(TASK, 32, 32)
    monkeypatch.setattr(
        "craft_ray.lerobot.metaworld.Renderer.__call__", lambda *_: made.append("") or np.zeros((32, 32, 3), np.uint8)
    )
    simulation.reset(0)
    simulation.step(simulation.expert())
    assert not made
    assert simulation.observe() is simulation.observe()
    assert len(made) == 1


def test_every_thread_renders() -> None:
    """An OpenGL context belongs to one thread, and a Ray worker runs each trial in another one."""
    found: list[tuple[bytes, bytes]] = [first_frame(MetaworldSimulation(TASK, 32, 32), 3)]
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(first_frame(MetaworldSimulation(TASK, 32, 32), 3)))
        thread.start()
        thread.join()
    assert found[0] == found[1] == found[2]


def test_asking_the_expert_changes_nothing() -> None:
    simulation = MetaworldSimulation("door-open-v3", 32, 32)
    simulation.reset(0)
    assert np.array_equal(simulation.expert(), simulation.expert())


def test_the_expert_succeeds() -> None:
    simulation = MetaworldSimulation("drawer-close-v3", 32, 32, REPEAT)
    for seed in range(10):
        simulation.reset(seed)
        assert any(simulation.step(simulation.expert()) for _ in range(25)), seed


def test_a_picture_shows_what_lerobots_shows_and_no_other_episode() -> None:
    theirs, mine = MetaworldEnv(TASK), MetaworldSimulation(TASK, 480, 480)
    theirs._ensure_env()
    theirs._env.seed(5)
    theirs._env.reset(seed=5)
    reference = theirs.render().astype(int)
    first_frame(mine, 5)
    picture = mine.observe().images[PICTURE].astype(int)
    first_frame(mine, 6)
    other = mine.observe().images[PICTURE].astype(int)
    moved = np.abs(picture - other).max(axis=2) > 40  # by a lot: the button and what it is fixed to
    assert 0.01 < moved.mean() < 0.3
    assert np.abs(picture - reference)[moved].mean() < 0.5 * np.abs(other - reference)[moved].mean()
    assert np.abs(picture - reference).mean() < 12


def test_the_renderer_of_one_simulation_draws_all_of_its_task_and_of_no_other() -> None:
    cases = [(task, seed) for task in ("drawer-close-v3", "door-open-v3") for seed in (1, 2)]
    alone = [drawn_in_a_new_thread(task, seed) for task, seed in cases]
    beside = [(MetaworldSimulation(task, 32, 32), seed) for task, seed in cases]
    for simulation, seed in beside:
        simulation.reset(seed)
    assert [simulation.observe().images[PICTURE].tobytes() for simulation, _ in beside] == alone
    assert len(set(alone)) == len(alone)


def drawn_in_a_new_thread(task: str, seed: int) -> bytes:
    """A picture from a renderer that has drawn nothing else."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(first_frame(MetaworldSimulation(task, 32, 32), seed)[0]))
    thread.start()
    thread.join()
    return found[0]


SCRIPT = """
import multiprocessing, sys
from pathlib import Path
from craft_ray.lerobot.demonstrations import write_demonstrations
from craft_ray.lerobot.metaworld import MetaworldSimulation
from craft_ray.lerobot.gym import GymSimulation

def drawn(seed):
    simulation = MetaworldSimulation("drawer-close-v3", 32, 32)
    simulation.reset(seed)
    return simulation.observe().images["observation.image"].tobytes()

if __name__ == "__main__":
    theirs = GymSimulation("metaworld", "drawer-close-v3")
    write_demonstrations(Path(sys.argv[1]), "drawer-close-v3", 1, 32, action_repeat=6)
    here = drawn(3)
    with multiprocessing.get_context(sys.argv[2]).Pool(1) as pool:
        assert pool.apply_async(drawn, (3,)).get(60) == here
"""


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_child_process_draws_and_nothing_is_printed_until_it_exits(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    own = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "LP_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(script), str(tmp_path / "demos"), how]
    found = subprocess.run(command, env=own, capture_output=True, text=True, timeout=400, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# -- rollouts


def test_the_records_do_not_depend_on_how_many_episodes_run_side_by_side() -> None:
    policy = Expert(range(100, 104))
    one_by_one = scored(rollouts(episodes=4, seed=100, films=2), policy, 1)
    assert set(policy.seen) == {1}
    together = rollouts(episodes=4, seed=100, films=2)
    assert scored(together, policy, 3) == one_by_one
    assert max(policy.seen) == 3
    assert scored(together, policy, 4) == one_by_one  # the simulations are used again


def test_a_record_describes_its_episode() -> None:
    first, second, third = scored(rollouts(seed=100), Expert(range(100, 103)), 3)
    assert first["id"] == f"{TASK}-seed100"
    assert first["prompt"] == "Press a button from the top"
    assert first["correct"] is second["correct"] is third["correct"] is True
    assert first["steps"] < 25
    assert (first["response"], first["prediction"]) == ("success", f"success after {first['steps']} steps")
    assert "film" in first
    assert not {"film"} & {*second, *third}


def test_a_policy_that_does_nothing_fails_at_the_time_limit() -> None:
    (record,) = scored(rollouts(episodes=1, max_steps=5), Still(), 1)
    assert record["correct"] is False
    assert record["steps"] == 5  # not a multiple of the chunk
    assert record["prediction"] == "no success in 5 steps"


def test_by_default_an_episode_lasts_as_long_as_the_simulator_allows() -> None:
    (record,) = scored(rollouts(episodes=1, action_repeat=50, films=0), Still(), 1)
    assert record["steps"] == 500 // 50


def test_fewer_actions_than_the_policy_returns_can_be_executed() -> None:
    policy = Expert([100], chunk=4)
    scored(rollouts(episodes=1, seed=100, execute=1), policy, 1)
    often = len(policy.seen)
    policy.seen.clear()
    scored(rollouts(episodes=1, seed=100), policy, 1)
    assert often > 3 * len(policy.seen) - 3


def test_a_policy_that_returns_nan_is_reported_in_one_line() -> None:
    with pytest.raises(DataError, match=r"at step 0 of button-press-topdown-v3-seed0 .* is not finite"):
        scored(rollouts(), Still(float("nan")), 3)


def test_a_policys_random_numbers_depend_on_the_episodes_alone() -> None:
    """And a rollout does not change the random state of a training."""

    class Drawing(Still):
        def act(self, samples: Sequence[Sample]) -> np.ndarray:
            drawn.append(torch.rand(1).item())
            return np.zeros((len(samples), 2, 4), np.float32)

    drawn: list[float] = []
    episodes = rollouts(episodes=1, max_steps=4, films=0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        scored(episodes, Drawing(), 1)
        following = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(following, torch.rand(1))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
    scored(rollouts(episodes=1, max_steps=4, films=0, seed=1), Drawing(), 1)
    assert drawn[4:] != drawn[:2]


@pytest.mark.parametrize(
    ("env", "package", "counts"),
    [("metaworld", "metaworld", True), ("metaworld", "mujoco", True), ("pusht", "lerobot", True),
     ("pusht", "mujoco", False)],
)  # fmt: skip
def test_another_version_of_the_simulator_is_another_fingerprint(
    env: str, package: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rollouts(env=env).fingerprint
    monkeypatch.setattr("craft_ray.lerobot.rollout.version", lambda name: "9.9" if name == package else version(name))
    assert (rollouts(env=env).fingerprint != before) is counts


def test_the_fingerprint_names_what_decides_an_episode() -> None:
    first = rollouts().fingerprint
    assert first == rollouts(films=3).fingerprint
    for change in (
        {"seed": 1}, {"max_steps": 7}, {"task": "drawer-close-v3"}, {"episodes": 2}, {"action_repeat": 1},
        {"execute": 1}, {"rename": {PICTURE: "x"}}, {"env": "pusht"},
    ):  # fmt: skip
        assert rollouts(**change).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "drawer-clos-v3"}, "evaluation.old.rollout.task is drawer-clos-v3, .* drawer-close-v3"),
        ({"env": "puhst"}, "evaluation.old.rollout.env is puhst, .* pusht"),
    ],
)
def test_an_unknown_task_or_environment_is_refused_with_similar_names(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollouts(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rename": {"observation.top": "x"}},
            "does not provide observation.top, but observation.image, observation.state",
        ),
        ({"rename": {PICTURE: "x"}}, "takes observation.images.top, .* provides observation.image, observation.state"),
        ({"max_steps": 84}, "84 actions repeated 6 times .* room for 83"),
        ({"execute": 3}, "execute is 3, but the policy returns 2"),
    ],
)
def test_a_mismatch_is_reported_before_an_episode_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollouts(**changes).check(cast("Any", Still()))


def test_the_policys_inputs_and_outputs_are_compared_with_the_simulators() -> None:
    policy = Still()
    policy.action_size = 7
    with pytest.raises(ConfigError, match=r"4 numbers .* the policy returns 7"):
        rollouts().check(cast("Any", policy))
    policy.features[STATE] = (14,)
    with pytest.raises(ConfigError, match=r"observation.state is \[4\] .* takes \[14\]"):
        rollouts().check(cast("Any", policy))
    policy.features["observation.images.wrist"] = (3, 32, 32)
    policy.cameras.append("observation.images.wrist")
    with pytest.raises(ConfigError, match=r"takes observation.images.top"):
        rollouts().check(cast("Any", policy))
    with pytest.raises(ConfigError, match=r"takes observation.images.wrist"):
        rollouts(rename={PICTURE: "observation.images.top"}).check(cast("Any", policy))
    with pytest.raises(ConfigError, match=r"only a policy acts in a simulator, but model.kind is huggingface"):
        rollouts().check(cast("Any", SimpleNamespace(kind="huggingface")))


def test_a_policy_of_another_picture_size_gets_its_own() -> None:
    episodes = rollouts(episodes=1, seed=100)
    assert scored(episodes, Expert([100]), 1)[0]["correct"]
    assert scored(episodes, Expert([100], size=48), 1)[0]["correct"]


@pytest.mark.parametrize("length", [1, 5, 8, 33, 500])
def test_a_film_shows_eight_moments_evenly_spaced(length: int) -> None:
    """The colour of a picture is its step."""
    film, made = Film(), 0
    for step in range(length + 1):
        if film.wants(step):
            film.add(step, picture_of(step))
            made += 1
    strip = np.asarray(Image.open(io.BytesIO(film.strip(length, picture_of(length)))))
    shown = [int(red) * 256 + int(green) for red, green, _ in strip[0, ::4]]
    assert shown[0] == 0
    assert shown[-1] == length
    assert len(shown) == min(8, length + 1)
    assert made <= 120
    if length > 8:
        assert max(abs(at - i * length / 7) for i, at in enumerate(shown)) <= length / 28


def picture_of(step: int) -> np.ndarray:
    return np.full((4, 4, 3), (step // 256, step % 256, 0), np.uint8)


def test_a_film_is_a_small_png() -> None:
    (record,) = scored(rollouts(episodes=1, max_steps=20), Still(0.5), 1)
    data = base64.b64decode(record["film"])
    assert Image.open(io.BytesIO(data)).size == (8 * 32, 32)
    assert len(data) < 40_000


# -- environments of LeRobot


@dataclass
class SmallMetaworld(EnvConfig):
    """LeRobot's own environment of Meta-World, with small pictures."""

    features: dict[str, PolicyFeature] = field(default_factory=dict)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> Any:
        def make() -> MetaworldEnv:
            made = MetaworldEnv(TASK, obs_type="pixels_agent_pos", observation_width=480, observation_height=480)
            made._ensure_env()
            # Its observation must fit the space that it declares; the pictures are not what is compared here.
            made._env.render = lambda: np.zeros((480, 480, 3), np.uint8)
            return made

        return {"metaworld": {0: gym.vector.SyncVectorEnv([make])}}


def test_lerobots_own_environment_has_the_same_episodes_and_successes() -> None:
    theirs, mine = GymSimulation("metaworld", TASK, config=SmallMetaworld()), MetaworldSimulation(TASK, 32, 32)
    assert theirs.description == mine.description
    assert (theirs.action_size, theirs.max_decisions) == (mine.action_size, mine.max_decisions)
    for seed in (11, 12, 11):
        theirs.reset(seed)
        mine.reset(seed)
        done = False
        while not done:
            seen = theirs.observe()
            assert set(seen.images) == {PICTURE}
            assert np.array_equal(seen.state[STATE], mine.observe().state[STATE])
            action = mine.expert()
            done = mine.step(action)
            assert theirs.step(action) == done
            assert theirs.over == done


ACTIONS_TAKEN: list[list[float]] = []
"""By all `Counter`s."""


class Counter(gym.Env):  # type: ignore[type-arg]
    """Counts its actions; done at `goal`, failed at `end`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    _max_episode_steps = 20

    def __init__(self, goal: int, end: int) -> None:
        self.goal, self.end, self.count = goal, end, 0
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
                "agent_pos": gym.spaces.Box(-100, 100, (1,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros((16, 16, 3), np.uint8)

    def _see(self) -> dict[str, np.ndarray]:
        return {"pixels": np.full((8, 8, 3), self.count, np.uint8), "agent_pos": np.array([float(self.count)])}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.count = 0
        return self._see(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.count += 1
        ACTIONS_TAKEN.append(action.tolist())
        done = self.count == self.goal
        return self._see(), 0.0, done or self.count == self.end, False, {"is_success": done}


@EnvConfig.register_subclass("counter")
@dataclass
class CounterConfig(EnvConfig):
    task: str | None = "count"
    task_ids: list[int] | None = None
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    )
    features_map: dict[str, str] = field(default_factory=lambda: {"action": "action"})

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> Any:
        if self.task == "broken":
            raise ModuleNotFoundError("No module named 'gym_counter'")

        def vector(number: int) -> Any:
            return gym.vector.SyncVectorEnv(
                [lambda: Counter(goal=4 if number == 0 else 99, end=6)],
                autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            )

        return {self.task: {number: vector(number) for number in self.task_ids or range(2)}}


class Counting(Still):
    """It returns three actions for each observation of `Counter`."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(n_action_steps=3)
        self.features = {"observation.images.top": (3, 8, 8), "observation.state": (1,)}
        self.cameras = ["observation.images.top"]
        self.action_size = 2
        self.prompts: list[str] = []

    def act(self, samples: Sequence[Sample]) -> np.ndarray:
        self.prompts += [sample.prompt for sample in samples]
        return np.zeros((len(samples), 3, 2), np.float32)


def test_any_environment_that_lerobot_knows_is_rolled_out() -> None:
    found = scored(rollouts(env="counter", task="count/0", action_repeat=1), Counting(), 2)
    assert [record["steps"] for record in found] == [4, 4, 4]
    assert all(record["correct"] for record in found)
    film = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[0]["film"]))))
    assert film[0, ::8, 0].tolist() == [0, 1, 2, 3, 4]  # not the start that gymnasium resets to


def test_an_episode_that_the_environment_ends_has_failed() -> None:
    found = scored(rollouts(env="counter", task="count/1", action_repeat=1), Counting(), 3)
    assert [(record["steps"], record["correct"]) for record in found] == [(6, False)] * 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("count", "has 2 tasks in count: specify one of them, as in count/0"),
        ("broken", "No module named 'gym_counter'"),
    ],
)
def test_an_environment_that_cannot_be_created_is_reported_in_one_line(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollouts(env="counter", task=task).check(cast("Any", Counting()))


@pytest.mark.parametrize(
    ("env", "package", "task"),
    [
        ("pusht", "gym_pusht", "PushT-v0"),
        ("libero", "libero", "libero_10/0"),
        ("aloha", "gym_aloha", "AlohaInsertion-v0"),
    ],
)
def test_an_environment_whose_package_is_missing_is_reported_in_one_line(env: str, package: str, task: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=f"the environment {env} with task {task} .* install its package") as caught:
        rollouts(env=env, task=task).check(cast("Any", Still()))
    assert len(str(caught.value).splitlines()) == 1


# -- a real policy


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_policy(tmp_path_factory.mktemp("robot") / "policy")


def test_a_real_policy_acts_alike_alone_and_beside_others(policy_folder: Path) -> None:
    model = load_model(ModelConfig(kind="lerobot", path=str(policy_folder)), "fp32", torch.device("cpu"))
    one_by_one = scored(rollouts(episodes=4, max_steps=6, execute=3, films=4), model, 1)
    together = scored(rollouts(episodes=4, max_steps=6, execute=3, films=4), model, 3)
    assert together == one_by_one
    assert len({record["film"] for record in together}) == 4
    assert model.module.training


def test_a_saved_policy_does_the_same_in_lerobots_own_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = small_policy(tmp_path / "policy", cameras=("top",), states=1, actions=2)
    model = load_model(ModelConfig(kind="lerobot", path=str(policy)), "fp32", torch.device("cpu"))
    saved, names = tmp_path / "saved", {"observation.image": "observation.images.top"}
    model.save(saved)
    ACTIONS_TAKEN.clear()
    ours = scored(rollouts(env="counter", task="count/0", action_repeat=1, episodes=2, seed=5, rename=names), model, 1)
    actions = [*ACTIONS_TAKEN]
    ACTIONS_TAKEN.clear()
    command = [
        *("lerobot-eval", f"--policy.path={saved}", "--policy.device=cpu", f"--rename_map={json.dumps(names)}"),
        *("--env.type=counter", "--env.task=count", "--env.task_ids=[0]", "--seed=5"),
        *("--eval.n_episodes=2", "--eval.batch_size=1", "--eval.use_async_envs=false", f"--output_dir={tmp_path}"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with sized(saved):
        lerobot_eval.main()
    found = json.loads((tmp_path / "eval_info.json").read_text())
    assert found["overall"]["pc_success"] == 100 * np.mean([record["correct"] for record in ours])
    assert len(actions) == sum(record["steps"] for record in ours)
    assert np.allclose(ACTIONS_TAKEN, actions, atol=1e-6)


def test_the_first_and_the_last_moment_of_an_episode_are_in_its_film() -> None:
    (record,) = scored(rollouts(episodes=1, seed=100), Expert([100]), 1)
    film = np.asarray(Image.open(io.BytesIO(base64.b64decode(record["film"]))))
    assert film.shape == (32, 8 * 32, 3)
    simulation = MetaworldSimulation(TASK, 32, 32, REPEAT)
    simulation.reset(100)
    assert np.array_equal(film[:, :32], simulation.observe().images[PICTURE])
    while not simulation.step(simulation.expert()):
        pass
    assert np.array_equal(film[:, -32:], simulation.observe().images[PICTURE])


def test_a_run_is_judged_by_success_and_scored_again_by_evaluate(
    policy_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", episodes=2, cameras=("camera0",))
    rollout = {"env": "metaworld", "task": TASK, "episodes": 2, "max_steps": 4, "action_repeat": REPEAT, "films": 1}
    judged = {"metric": "success", "batch_size": 2}
    tree = {
        "name": "robot",
        "output_dir": str(tmp_path / "runs"),
        "model": {"kind": "lerobot", "path": str(policy_folder)},
        "task": {"path": str(tmp_path / "data")},
        "craft": {"enabled": False},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "validation": {"new": {**judged, "rollout": {**rollout, "seed": 50}}, "every": 1},
        "evaluation": {"new": {**judged, "rollout": rollout}, "old": {**judged, "rollout": {**rollout, "seed": 9}}},
        "workers": {"num_workers": 0},
    }
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(parse_config(tree, "test")))
    run = RunFolder(tmp_path / "runs" / "robot-baseline-seed0")
    capfd.readouterr()  # writing the data draws progress bars

    def command(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["craft-ray", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            cli.main()
        out, err = capfd.readouterr()
        assert not err
        return out

    command("train", config)
    result = run.finished()
    assert result is not None
    assert [record["step"] for record in run.read_validation()] == [1, 2]
    assert all(record["new/score"] == 0 and record["new/ratio"] is None for record in run.read_validation())
    for name in ("old_before", "old_after", "new_before", "new_after"):
        records = run.read_predictions(name)
        assert [record["steps"] for record in records] == [4, 4]
        assert ["film" in record for record in records] == [True, False]
    assert run.read_predictions("new_before")[0]["id"] == f"{TASK}-seed0"
    printed = command("evaluate", config, "--checkpoint", run.path, "--out", tmp_path / "scores.json")
    assert "new success, n = 2" in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: found["score"] for name, found in scores["new"]["scores"].items()}["teacher"] == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    own = {name: value for name, value in lines[0].items() if name not in ("model", "skill")}
    assert own in (run.read_predictions("old_before")[0], run.read_predictions("new_before")[0])


# -- demonstrations


def digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_demonstrations_are_a_data_set_of_what_the_expert_did(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demos", TASK, 2, 32, action_repeat=REPEAT, noise=0.2, seed=3)
    data = LeRobotDataset("demos", root=tmp_path / "demos")
    assert data.num_episodes == 2
    first = data[0]
    assert first["task"] == "Press a button from the top"
    assert first[PICTURE].shape == (3, 32, 32)
    simulation = MetaworldSimulation(TASK, 32, 32, REPEAT)
    simulation.reset(3)
    assert np.array_equal(first[STATE].numpy(), simulation.observe().state[STATE])
    pixels = (first[PICTURE] * 255).round().numpy().transpose(1, 2, 0)
    assert np.array_equal(pixels, simulation.observe().images[PICTURE])
    assert np.array_equal(first["action"].numpy(), simulation.expert())  # without the noise
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos"]


def test_demonstrations_written_twice_are_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_demonstrations(tmp_path / name / "demos", TASK, 1, 32, action_repeat=REPEAT, noise=0.2)
    assert digests(tmp_path / "a" / "demos") == digests(tmp_path / "b" / "demos")


def test_demonstrations_that_do_not_succeed_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower the noise"):
        write_demonstrations(tmp_path / "demos", TASK, 1, 32, action_repeat=50, noise=50)
    with pytest.raises(ConfigError, match=r"demonstrations.task is nothing"):
        write_demonstrations(tmp_path / "demos", "nothing", 1, 32)
    assert not list(tmp_path.iterdir())


def test_demonstrations_open_as_a_source(tmp_path: Path) -> None:
    write_demonstrations(tmp_path / "demos", TASK, 2, 32, action_repeat=REPEAT)
    source = open_source(AutoData(path=str(tmp_path / "demos")), "task")
    first, last = source[0], source[len(source) - 1]
    assert first.prompt == "Press a button from the top"
    assert first.frame is not None
    assert last.frame is not None
    simulation = MetaworldSimulation(TASK, 32, 32, REPEAT)
    simulation.reset(0)
    assert np.array_equal(first.frame.images[PICTURE], simulation.observe().images[PICTURE])
    assert first.frame.actions is not None
    moments = [simulation.step(action) for action in first.frame.actions]  # the same actions succeed again
    assert any(moments)
    assert not moments[0]


def test_demonstrations_that_are_cut_short_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = MetaworldSimulation.step, []

    def step(self: MetaworldSimulation, action: np.ndarray) -> bool:
        calls.append(list(tmp_path.glob("demos")))
        if len(calls) == 30:
            raise KeyboardInterrupt
        return own(self, action)

    monkeypatch.setattr(MetaworldSimulation, "step", step)
    with pytest.raises(KeyboardInterrupt):
        write_demonstrations(tmp_path / "demos", TASK, 5, 32, action_repeat=REPEAT)
    gc.collect()
    assert not any(calls)
    assert not list(tmp_path.iterdir())
