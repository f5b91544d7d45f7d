"""Retention of old skills: a mode measures the loss of a skill, and a constraint holds it within its budget."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from craft_ray.config.modes import RETENTION_MODES
from craft_ray.retention.mode import RetentionMode


def mode_named(name: str) -> type[RetentionMode[Any]]:
    """The class of a retention mode. `craft_ray/config/modes.py` lists the modes."""
    module, _, own_name = RETENTION_MODES[name].implementation.partition(":")
    mode: type[RetentionMode[Any]] = getattr(import_module(module), own_name)
    return mode
