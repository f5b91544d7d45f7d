"""The retention modes: the config's table and the classes agree."""

from __future__ import annotations

import pytest

from craft_ray.config import CraftConfig
from craft_ray.config.modes import RETENTION_MODES
from craft_ray.retention import mode_named
from craft_ray.retention.mode import RetentionMode


@pytest.mark.parametrize("name", RETENTION_MODES)
def test_a_mode_is_found_under_its_own_name(name: str) -> None:
    mode = mode_named(name)
    assert issubclass(mode, RetentionMode)
    assert mode.name == name
    assert not mode.__abstractmethods__


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'logit' is not a retention mode; the modes are hidden, token_ce"):
        CraftConfig.model_validate({"retention_mode": "logit"})
