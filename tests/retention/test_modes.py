"""The retention modes: each is known to the config, to the cache and to the constraint under one name."""

from __future__ import annotations

from typing import get_args

from craft_ray.config.modes import RETENTION_MODES
from craft_ray.config.types import RetentionMode
from craft_ray.retention import MODES


def test_every_mode_is_known_everywhere() -> None:
    assert set(MODES) == set(RETENTION_MODES) == set(get_args(RetentionMode))


def test_a_mode_is_found_under_its_own_name() -> None:
    assert all(mode.name == name for name, mode in MODES.items())
