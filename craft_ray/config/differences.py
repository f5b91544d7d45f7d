"""What differs between two configs, and whether it decides a number of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from craft_ray.config.experiment import Experiment

FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.prefetch",
    "train.check_minutes",
    "workers",
    "tracking",
    "compare",
    "sweep",
    "objective",
)
"""Keys and sections that decide no number of a run, up to the rounding of another number of workers."""


def differences(original: dict[str, Any], given: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys in which two configs differ, one at a time, with both values."""
    for key in dict.fromkeys([*original, *given]):  # the kinds of a section have different keys
        value, now = original.get(key), given.get(key)
        if isinstance(value, dict) and isinstance(now, dict):
            yield from differences(value, now, f"{prefix}{key}.")
        elif value != now:
            yield f"{prefix}{key} was {value}, is {now}"


def deciding_difference(original: Experiment, given: Experiment, places: bool = False) -> str | None:
    """The first key that decides a number and differs, with both values; None if there is no such key.

    Args:
        places: whether the places of data and caches count, because nothing else says what was there.
    """
    trees = [_deciding(config) for config in (original, given)]
    if not places:
        for tree in trees:
            _forget_places(tree)
    return next(differences(*trees), None)


def _forget_places(tree: dict[str, Any]) -> None:
    """Leave out where the inputs are whose content has a hash of its own."""
    del tree["output_dir"]
    tree["craft"].pop("anchor_cache_dir")
    sets = [tree[section][skill] for section in ("validation", "evaluation") for skill in ("old", "new")]
    sources = [tree["task"], (tree["anchors"] or {}).get("source"), *((found or {}).get("data") for found in sets)]
    for source in sources:
        if source is not None:
            del source["path"]


def _deciding(config: Experiment) -> dict[str, Any]:
    sections = {key.partition(".")[0] for key in FREE if "." in key}
    free = {key: True for key in FREE if "." not in key}
    within = {section: {key.partition(".")[2] for key in FREE if key.startswith(f"{section}.")} for section in sections}
    return config.model_dump(exclude={**free, **within})
