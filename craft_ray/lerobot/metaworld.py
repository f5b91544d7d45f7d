"""Meta-World (arXiv 1910.10897), rendered fast and without a screen.

LeRobot's environment for it renders every step, with shadows and multisampling: seven to eleven frames a second on a
CPU. Here a picture is rendered only on request, without either, by one renderer for all episodes side by side.
Episodes start as LeRobot's do: the same seed gives the same initial condition.
"""

from __future__ import annotations

import atexit
import difflib
import os
import sys
import threading
import warnings
import weakref
from typing import Any

import numpy as np

from craft_ray.data.frame import Frame
from craft_ray.errors import ConfigError, first_line
from craft_ray.extras import install

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "")  # read when mujoco is imported
# The software renderer draws in the calling thread: no slower at this size, and a forked process can draw as well.
os.environ.setdefault("LP_NUM_THREADS", "0")

NO_RENDERER = (
    "install OpenGL's EGL (on Debian libegl1 and libgl1-mesa-dri), or set the environment variable MUJOCO_GL to "
    "another way to render (egl, osmesa, glfw)"
)

try:
    import mujoco
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP
except ModuleNotFoundError as error:
    raise ConfigError(f"Meta-World needs the package {error.name}: {install('lerobot')}") from None
except (ImportError, AttributeError, RuntimeError) as error:
    # mujoco raises one of them if MUJOCO_GL names a renderer that is not available.
    raise ConfigError(
        f"mujoco cannot be imported with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): {NO_RENDERER}"
    ) from None

CAMERA = "corner2"
CAMERA_POSITION = (0.75, 0.075, 0.7)
"""LeRobot's position of this camera, closer than Meta-World's."""
PICTURE, STATE = "observation.image", "observation.state"
STATES = 4
"""The hand's position and how far it is open: the part of Meta-World's observation that a policy gets."""
ACTIONS = 4
"""Where the hand moves, and whether it closes."""
CONTROL_HZ = 80
"""Actions per second of simulated time."""
MAX_STEPS = 500
GEOMS = 2000


def check_task(task: str, key: str) -> None:
    """
    Raises:
        ConfigError: there is no such task.
    """
    if task not in TASK_DESCRIPTIONS:
        near = difflib.get_close_matches(task, TASK_DESCRIPTIONS, 3, 0.4)
        raise ConfigError(
            f"{key}.task is {task}, but Meta-World has no such task: choose one, e.g. "
            f"{', '.join(near or sorted(TASK_DESCRIPTIONS))}"
        )


class Renderer:
    """Renders any simulation of one task.

    mujoco's own renderer belongs to one model, and takes a second to create and 70 MB. The models of one task differ
    only in the positions of objects, which are passed with each picture.
    """

    _freed = True

    def __init__(self, model: Any, height: int, width: int) -> None:
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight, model.vis.global_.offwidth = height, width
        try:
            self._context = mujoco.GLContext(width, height)
            self._context.make_current()
            self._gpu = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:  # the driver raises many types of errors
            raise ConfigError(
                f"no picture can be rendered with MUJOCO_GL={os.environ['MUJOCO_GL']} ({type(error).__name__}: "
                f"{first_line(error)}): {NO_RENDERER}"
            ) from None
        self._thread = threading.get_ident()
        self._freed = False
        atexit.register(_free, weakref.ref(self))  # runs before the interpreter unloads the driver's module
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._gpu)
        self._scene = mujoco.MjvScene(model, GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag.value] = 0
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value
        self._camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA.value, CAMERA)
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)

    def __call__(self, model: Any, data: Any) -> np.ndarray:
        """A picture, uint8 [H, W, 3], the right way up."""
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._option, self._perturb, self._camera, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._gpu)
        mujoco.mjr_readPixels(self._pixels, None, self._rectangle, self._gpu)
        # OpenGL's rows start at the bottom, and this camera is mounted upside down: only the columns are left to flip.
        return np.ascontiguousarray(self._pixels[:, ::-1])

    def free(self) -> None:
        """Release the driver's memory; its contents can only be freed by the thread that created them."""
        if self._freed:
            return
        self._freed = True
        if self._thread == threading.get_ident():
            self._context.make_current()
            self._gpu.free()
        self._context.free()

    def __del__(self) -> None:
        self.free()


class _Renderers(threading.local):
    """The renderers of a thread. An OpenGL context belongs to one thread and is released when that thread ends."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], Renderer] = {}

    def of(self, task: str, height: int, width: int) -> Renderer:
        """The renderer that all simulations of a task share."""
        key = (task, height, width)
        if key not in self._made:
            self._made[key] = Renderer(_environment(task).model, height, width)
        return self._made[key]


_renderers = _Renderers()


class MetaworldSimulation:
    """One task. An episode depends only on its seed."""

    action_size = ACTIONS
    over = False
    """Meta-World does not end an episode before its limit."""

    def __init__(self, task: str, height: int, width: int, action_repeat: int = 1) -> None:
        """
        Args:
            height, width: of the pictures.
            action_repeat: how many times each action is executed.
        """
        self.task = task
        self.description: str = TASK_DESCRIPTIONS[task]
        self.max_decisions = MAX_STEPS // action_repeat
        self._repeat = action_repeat
        self._size = (height, width)
        self._env = _environment(task)
        self._env._freeze_rand_vec = False  # as in LeRobot: otherwise every episode starts alike
        self._env.seeded_rand_vec = True
        self._env.model.camera(CAMERA).pos = CAMERA_POSITION
        self._expert = ENV_POLICY_MAP[task]()
        self._observed = np.empty(0)
        self._frame: Frame | None = None

    def reset(self, seed: int) -> None:
        """Start an episode; the initial condition is a function of the task and the seed."""
        self._env.seed(seed)
        self._observed, _ = self._env.reset()
        self._frame = None

    def observe(self) -> Frame:
        """What a policy sees now. Rendered on request, and once per step."""
        if self._frame is None:
            picture = _renderers.of(self.task, *self._size)(self._env.model, self._env.data)
            self._frame = Frame({PICTURE: picture}, {STATE: self._observed[:STATES].astype(np.float32)})
        return self._frame

    def expert(self) -> np.ndarray:
        """The action that Meta-World's script would take now, float32 [4]."""
        seen = self._observed.copy()  # some scripts write into their input
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that an action exceeds 1
            action = self._expert.get_action(seen)
        return np.clip(action, -1, 1).astype(np.float32)

    def step(self, action: np.ndarray) -> bool:
        """Execute one decision, float32 [4], and return whether the task is done."""
        self._frame = None
        for _ in range(self._repeat):
            self._observed, _, _, _, info = self._env.step(np.clip(action, -1, 1))
            if info["success"] > 0:
                return True
        return False

    def close(self) -> None:
        self._env.close()


def _environment(task: str) -> Any:
    """Meta-World's own environment, which shows the goal to the expert."""
    return ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)


def _free(renderer: weakref.ref[Renderer]) -> None:
    found = renderer()
    if found is not None:
        found.free()
