"""The packages of an extra: whether they are installed, and how they become so."""

from __future__ import annotations

import importlib

from craft_ray.errors import ConfigError


def missing(*packages: str) -> str | None:
    """The first of some packages that does not import here, and why (`wandb does not import (...)`); None if all do.

    They are imported, so ask where they are used next.
    """
    for name in packages:
        try:
            module = importlib.import_module(name)
            if module.__file__ is None:  # a folder of the working directory, e.g. ./wandb, passes for a package
                raise ImportError(f"{next(iter(module.__path__))} is no package")
        except ImportError as error:
            return f"{name} does not import ({error})"
    return None


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'craft-ray[{extra}]'"


def require_lerobot(why: str) -> None:
    """
    Raises:
        ConfigError: LeRobot is not installed.
    """
    if missing("lerobot"):
        raise ConfigError(f"{why}, but LeRobot is not installed: {install('lerobot')} (Python 3.12 or newer)")
