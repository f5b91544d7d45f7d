"""An experiment from YAML, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from craft_ray.config.experiment import Experiment, parse_config
from craft_ray.config.overrides import apply_changes, parse_overrides
from craft_ray.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), base: Path | None = None) -> Experiment:
    """The experiment in a YAML file with `key=value` overrides. Paths in it become absolute.

    Args:
        base: the folder that relative paths start from; the working directory where it is None.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value is out of range.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}: name a YAML file") from None
    except OSError as error:
        raise ConfigError(f"the config {path} does not open ({error.strerror}): name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, a config is a mapping of sections")
    apply_changes(tree, parse_overrides(overrides))
    return parse_config(tree, str(path), base)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML would drop the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        YAMLError: it is none, or names a key twice.
    """
    return yaml.load(text, _Loader)


def dump_config(config: Experiment) -> str:
    """The resolved experiment as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
