"""The names that the integers of a column stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from craft_ray.data.references import column_of

LISTS = ("List", "LargeList", "Sequence")


def classes_of(features: Mapping[str, Any], references: Iterable[str]) -> dict[str, Sequence[str]]:
    """The classes' names of each reference to a ClassLabel, or to lists of them.

    Args:
        features: by column, as Hugging Face datasets writes them in JSON.
    """
    found = {reference: _names(_feature_at(features, reference)) for reference in references}
    return {reference: names for reference, names in found.items() if names}


def _feature_at(features: Mapping[str, Any], reference: str) -> Any:
    """The feature that a reference names; None if there is none."""
    column = column_of(reference, features)
    feature: Any = features.get(column)
    path = [] if column == reference else reference.split(".")[1:]
    for part in path:
        entry = _entry(feature)
        if entry is None:
            feature = feature.get(part) if _is_mapping(feature) else None
        elif _kind(feature) == "Sequence" and _is_mapping(entry):
            # What earlier versions called a sequence of mappings is stored as one mapping of lists.
            feature = {"_type": "List", "feature": entry[part]} if part in entry else None
        else:
            feature = entry if part.isdigit() else None
    return feature


def _names(feature: Any) -> Sequence[str] | None:
    entry = _entry(feature)
    if entry is not None:
        return _names(entry)
    return feature.get("names") if _kind(feature) == "ClassLabel" else None


def _entry(feature: Any) -> Any:
    """The feature of a list's entries; None for what is not a list."""
    if isinstance(feature, list):  # as earlier versions wrote it
        return feature[0] if feature else None
    return feature["feature"] if _kind(feature) in LISTS else None


def _kind(feature: Any) -> str | None:
    kind = feature.get("_type") if isinstance(feature, Mapping) else None
    return kind if isinstance(kind, str) else None  # a mapping may have a key of that name


def _is_mapping(feature: Any) -> bool:
    return isinstance(feature, Mapping) and _kind(feature) is None
