"""Reading an experiment from YAML, and writing it back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from craft_ray.config.experiment import Experiment, parse_config
from craft_ray.config.overrides import apply_changes, parse_overrides
from craft_ray.config.plain_yaml import read_yaml
from craft_ray.config.types import EARLIER_POSITIONS, current_position
from craft_ray.errors import ConfigError

logger = logging.getLogger(__name__)


def load_config(path: str | Path, overrides: Sequence[str] = (), base: Path | None = None) -> Experiment:
    """Read the experiment in a YAML file with `key=value` overrides. Paths in it become absolute.

    Args:
        base: the folder that relative paths start from; None means the working directory.

    Raises:
        ConfigError: the file is missing or not valid YAML, a key is unknown, or a value is out of range.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}: specify a YAML file") from None
    except OSError as error:
        raise ConfigError(f"the config {path} does not open ({error.strerror}): name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, a config is a mapping of sections")
    apply_changes(tree, parse_overrides(overrides))
    for key, name in _earlier_positions(tree):
        now = current_position(name)
        logger.warning("%s: %s is the earlier name of %s, and is read as that", key, name, now)
    return parse_config(tree, str(path), base)


def _earlier_positions(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The positions in a config that have another name now, with the key that they are under."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _earlier_positions(value, f"{prefix}{key}.")
        elif key == "positions" and isinstance(value, list):
            yield from ((f"{prefix}{key}", str(name)) for name in value if str(name) in EARLIER_POSITIONS)


def dump_config(config: Experiment, changed: bool = False) -> str:
    """The resolved experiment as YAML; `load_config` reads it back as an equal one.

    Args:
        changed: leave out what has its default: shorter to read, and not meant to be loaded again.
    """
    tree = config.model_dump(mode="json", exclude_defaults=changed)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
