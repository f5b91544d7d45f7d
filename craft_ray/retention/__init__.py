"""Retention of old skills: a mode measures the loss of a skill, and a constraint holds it within its budget."""

from __future__ import annotations

from typing import Any

from craft_ray.retention.hidden import Hidden
from craft_ray.retention.mode import RetentionMode
from craft_ray.retention.token_ce import TokenCE

MODES: dict[str, type[RetentionMode[Any]]] = {mode.name: mode for mode in (Hidden, TokenCE)}
