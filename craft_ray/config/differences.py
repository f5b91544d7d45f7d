"""What differs between two configs, and whether it decides a number of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from craft_ray.config.experiment import Experiment

FREE = (
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.checkpoint_async",
    "train.keep_checkpoints",
    "train.prefetch",
    "train.loader_workers",
    "train.check_minutes",
    "workers",
    "tracking",
    "about",
    "compare",
    "sweep",
    "objective",
)
"""Keys and sections that decide no number of a run, up to the rounding of another number of workers."""

PLACES: dict[str | None, tuple[str, ...]] = {
    None: ("folder",),
    "data": ("path",),
    "harness": ("folder", "include_path"),
}
"""Keys of a held-out set, and of the sections in it, that say where something is."""


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
    settings = _deciding if places else deciding_settings
    return next(differences(settings(original), settings(given)), None)


def deciding_settings(config: Experiment) -> dict[str, Any]:
    """What decides the numbers of a run, as a tree; not where its data and its cache are, whose content has hashes."""
    return _without_places(_deciding(config))


def _without_places(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out the places of inputs whose content has a hash of its own, and how a cache was built, which is in its
    identity; a run only reads which layers and positions to anchor."""
    del tree["output_dir"], tree["craft"]["anchor_cache_dir"]
    for part in tree["task"].get("mix", [{"data": tree["task"]}]):
        del part["data"]["path"]
    if tree["anchors"] is not None:
        tree["anchors"] = {key: tree["anchors"][key] for key in ("positions", "layers")}
    for skill in tree["skills"].values():
        del skill["anchors"]
    for section in (tree["validation"], tree["evaluation"], *tree["skills"].values()):
        for scored in section.values():
            for part, places in PLACES.items() if isinstance(scored, dict) else ():
                for place in places:
                    (scored if part is None else scored.get(part, {})).pop(place, None)
    return tree


def _deciding(config: Experiment) -> dict[str, Any]:
    sections = {key.partition(".")[0] for key in FREE if "." in key}
    free = {key: True for key in FREE if "." not in key}
    within = {section: {key.partition(".")[2] for key in FREE if key.startswith(f"{section}.")} for section in sections}
    return config.model_dump(exclude={**free, **within})
