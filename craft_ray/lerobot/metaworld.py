"""Meta-World (arXiv 1910.10897), rendered fast and without a screen.

LeRobot's environment of it renders every step, with shadows and multisampling: seven to eleven frames a second on a
processor. Here a picture is made when it is asked for, without either, by one renderer for all episodes side by side.
Episodes begin as LeRobot's do: the same seed gives the same initial condition.
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
from craft_ray.errors import ConfigError
from craft_ray.extras import install

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "")  # read when mujoco is imported
# The software renderer draws in the thread that asks: no slower at this size, and a forked process can draw, too.
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
    # mujoco meets one of them where MUJOCO_GL asks for what is not there.
    raise ConfigError(
        f"mujoco cannot be imported with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): {NO_RENDERER}"
    ) from None

CAMERA = "corner2"
CAMERA_PLACE = (0.75, 0.075, 0.7)
"""Where LeRobot puts this camera, nearer than Meta-World has it."""
PICTURE, STATE = "observation.image", "observation.state"
STATES = 4
"""The hand's place and how far it is open: what a policy is told, of all that Meta-World observes."""
ACTIONS = 4
"""Where the hand moves, and whether it closes."""
CONTROL_HZ = 80
"""Actions in a second of the simulated time."""
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
            f"{key}.task is {task}, Meta-World has no such task: choose one, e.g. "
            f"{', '.join(near or sorted(TASK_DESCRIPTIONS))}"
        )


class Renderer:
    """Pictures of any simulation of one task.

    mujoco's own renderer belongs to one model, takes a second to make and 70 MB. The models of one task differ in where
    things stand, and that is told with each picture.
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
        except Exception as error:  # of the driver, by many names
            raise ConfigError(
                f"no picture can be rendered with MUJOCO_GL={os.environ['MUJOCO_GL']} ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}): {NO_RENDERER}"
            ) from None
        self._thread = threading.get_ident()
        self._freed = False
        atexit.register(_free, weakref.ref(self))  # before the interpreter takes the driver's module apart
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
        # OpenGL's rows begin at the bottom, and this camera hangs upside down: what is left to turn is the columns.
        return np.ascontiguousarray(self._pixels[:, ::-1])

    def free(self) -> None:
        """Give the driver's memory back; what lies in it can only be reached from the thread that made it."""
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
    """The renderers of a thread. A context of OpenGL belongs to one, and goes when its thread ends."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], Renderer] = {}

    def of(self, task: str, height: int, width: int) -> Renderer:
        """The one for all simulations of a task."""
        key = (task, height, width)
        if key not in self._made:
            self._made[key] = Renderer(_environment(task).model, height, width)
        return self._made[key]


_renderers = _Renderers()


class MetaworldSimulation:
    """One task. An episode is decided by its seed alone."""

    action_size = ACTIONS
    over = False
    """Meta-World ends no episode before its limit."""

    def __init__(self, task: str, height: int, width: int, action_repeat: int = 1) -> None:
        """
        Args:
            height, width: of the pictures.
            action_repeat: times that an action is carried out.
        """
        self.task = task
        self.description: str = TASK_DESCRIPTIONS[task]
        self.max_decisions = MAX_STEPS // action_repeat
        self._repeat = action_repeat
        self._size = (height, width)
        self._env = _environment(task)
        self._env._freeze_rand_vec = False  # as LeRobot does it: else every episode begins alike
        self._env.seeded_rand_vec = True
        self._env.model.camera(CAMERA).pos = CAMERA_PLACE
        self._expert = ENV_POLICY_MAP[task]()
        self._observed = np.empty(0)
        self._frame: Frame | None = None

    def reset(self, seed: int) -> None:
        """Begin an episode: the initial condition is a function of the task and the seed."""
        self._env.seed(seed)
        self._observed, _ = self._env.reset()
        self._frame = None

    def observe(self) -> Frame:
        """What a policy sees now. Rendered when it is asked for, and once a moment."""
        if self._frame is None:
            picture = _renderers.of(self.task, *self._size)(self._env.model, self._env.data)
            self._frame = Frame({PICTURE: picture}, {STATE: self._observed[:STATES].astype(np.float32)})
        return self._frame

    def expert(self) -> np.ndarray:
        """What Meta-World's script would do now, float32 [4]."""
        seen = self._observed.copy()  # some scripts write into what they are shown
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that they ask for more than 1
            action = self._expert.get_action(seen)
        return np.clip(action, -1, 1).astype(np.float32)

    def step(self, action: np.ndarray) -> bool:
        """Carry out one decision, float32 [4], and tell whether the task is done."""
        self._frame = None
        for _ in range(self._repeat):
            self._observed, _, _, _, info = self._env.step(np.clip(action, -1, 1))
            if info["success"] > 0:
                return True
        return False

    def close(self) -> None:
        self._env.close()


def _environment(task: str) -> Any:
    """Meta-World's own, which tells the expert where the goal is."""
    return ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)


def _free(renderer: weakref.ref[Renderer]) -> None:
    found = renderer()
    if found is not None:
        found.free()
