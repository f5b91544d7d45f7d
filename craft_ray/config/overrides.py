"""Overrides: values by dotted key, as on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from craft_ray.errors import ConfigError


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` texts to values by dotted key.

    Raises:
        ConfigError: an override has no key, or its value is not valid YAML.
    """
    changes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"'{override}' is not an override: write key=value, e.g. craft.lambda_lr=0.05")
        try:
            changes[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"the value of '{override}' is not valid YAML") from None
    return changes


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} is not a section")
    tree[leaf] = value
