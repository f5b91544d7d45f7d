"""The packages of an extra: whether they are installed, and how to install them."""

from __future__ import annotations

import importlib

from craft_ray.errors import ConfigError


def missing(*packages: str) -> str | None:
    """The first of these packages that cannot be imported, and why (`wandb does not import (...)`); None if all can.

    This imports them, so call it right before they are used.
    """
    for name in packages:
        try:
            module = importlib.import_module(name)
            if module.__file__ is None:  # a folder in the working directory, e.g. ./wandb, imports like a package
                raise ImportError(f"{next(iter(module.__path__))} is not a package")
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
