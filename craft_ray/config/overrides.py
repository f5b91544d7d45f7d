"""Overrides: values by dotted key, as on a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from craft_ray.config.modes import unit_of
from craft_ray.config.plain_yaml import read_yaml
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
            changes[key] = read_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"the value of '{override}' is not valid YAML") from None
    return changes


def apply_changes(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set values at dotted keys of a config's tree, in place.

    A budget keeps the unit that it was specified in, so that it is refused if the unit changes and it does not.

    Raises:
        ConfigError: a key is in no section, or the unit changes and not all budgets do.
    """
    before = _unit(tree)
    craft = tree.get("craft")
    if isinstance(craft, dict) and craft.get("epsilon_start") is not None and craft.get("epsilon_unit") is None:
        craft["epsilon_unit"] = before
    budgets = _further_budgets(tree)
    for key, value in changes.items():
        _set_value(tree, key, value)
    if "craft.epsilon_start" in changes and "craft.epsilon_unit" not in changes:
        tree["craft"]["epsilon_unit"] = None
    after = _unit(tree)
    unchanged = [key for key in _further_budgets(tree) if key in budgets and key not in changes]
    budget = None if before == after else tree["craft"].get("epsilon_start")
    # A budget of its own that does not change either is refused where the section is validated.
    if before != after and unchanged and (budget is None or "craft.epsilon_start" in changes):
        key = unchanged[0]
        other = "the retention loss" if budget is None else f"craft.epsilon_start {budget}"
        raise ConfigError(
            f"{key} {budgets[key]} is counted in {before}, {other} in {after}: change it, too, or set {key}=null"
        )


def _unit(tree: Mapping[str, Any]) -> str | None:
    craft = tree.get("craft") or {}
    unit = unit_of(craft) if isinstance(craft, Mapping) else None
    return None if unit is None else unit.name


def _further_budgets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The budgets other than `craft.epsilon_start`, which are in the same unit."""
    sections = {"craft.epsilon_end": (tree.get("craft"), "epsilon_end")}
    skills = tree.get("skills")
    for name, skill in skills.items() if isinstance(skills, Mapping) else ():
        sections[f"skills.{name}.epsilon_start"] = (skill, "epsilon_start")
    return {
        key: section[name]
        for key, (section, name) in sections.items()
        if isinstance(section, Mapping) and section.get(name) is not None
    }


def _set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {parent} is not a section")
    tree[leaf] = value
