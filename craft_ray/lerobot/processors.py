"""A policy's processors, and the statistics that its normaliser scales by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

from craft_ray.errors import ConfigError, DataError, ModelError, first_line

STATISTICS_NEEDED = {
    NormalizationMode.IDENTITY: (),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""The statistics that each way of scaling needs."""


@dataclass
class Processors:
    """LeRobot's two pipelines: from a policy's inputs to tensors, and from its outputs to actions."""

    before: Any
    after: Any

    def normalizers(self) -> Iterator[NormalizerProcessorStep | UnnormalizerProcessorStep]:
        for step in (*self.before.steps, *self.after.steps):
            if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
                yield step


def check_statistics(processors: Processors, path: Path) -> None:
    """Refuse a normaliser without statistics; LeRobot would leave the feature unscaled."""
    for step in processors.normalizers():
        stats = step.stats or {}
        for name, feature in step.features.items():
            mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
            if lacking := [key for key in STATISTICS_NEEDED[mode] if key not in stats.get(name, {})]:
                raise ModelError(
                    f"model {path}: its normaliser has no statistics of {name} ({', '.join(lacking)}), which it scales "
                    f"by {mode.value}: use the folder that LeRobot's training saved, with its policy_preprocessor "
                    f"files"
                )


def merge_statistics(processors: Processors, datasets: tuple[str, ...]) -> None:
    """Widen the normalisers' statistics to cover data sets. Of extremes the outer ones are kept; mean and variance are
    pooled over all frames if the policy's folder stores its number of frames, otherwise with equal weights.

    Raises:
        ConfigError: a data set does not open.
        DataError: it has other shapes, or lacks statistics that are needed.
    """
    others = {name: _dataset_statistics(name) for name in datasets}
    for step in processors.normalizers():
        merged = {}
        for feature, own in (step.stats or {}).items():
            needed = _needed(step, feature)
            parts = [_numbers(own)]
            for name, other in others.items():
                if needed is not None and (needed or feature in other):
                    parts.append(_mergeable(feature, _numbers(other.get(feature, {})), parts[0], needed, name))
            merged[feature] = _merged(parts)
        step.stats = merged
        step.to(device=step.device, dtype=step.dtype)


def _needed(step: NormalizerProcessorStep | UnnormalizerProcessorStep, feature: str) -> Sequence[str] | None:
    """The statistics of a feature that a data set must have. None for a camera, which keeps its own: its range is
    known, and they are often ImageNet's."""
    known = step.features.get(feature)
    if known is None or known.type is FeatureType.VISUAL:
        return () if known is None else None
    return STATISTICS_NEEDED[step.norm_map.get(known.type, NormalizationMode.IDENTITY)]


def _numbers(stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.asarray(value, dtype=np.float64) for key, value in stats.items()}


def _mergeable(
    feature: str, other: dict[str, np.ndarray], own: dict[str, np.ndarray], needed: Sequence[str], dataset: str
) -> dict[str, np.ndarray]:
    """A data set's statistics of a feature, if they can be merged with the policy's.

    Raises:
        DataError: they have other shapes, or lack statistics that are needed.
    """
    if lacking := [key for key in needed if key not in other]:
        raise DataError(
            f"model.merge_statistics: {dataset} has no statistics of {feature} ({', '.join(lacking)}), by which the "
            f"policy scales it: leave that data set out"
        )
    for key in (own.keys() & other.keys()) - {"count"}:
        ours, theirs = own[key].squeeze().shape, other[key].squeeze().shape
        if ours != theirs:
            raise DataError(
                f"model.merge_statistics: {feature} is {list(theirs)} in {dataset}, but {list(ours)} in the policy: "
                f"leave that data set out"
            )
    return other


def _dataset_statistics(name: str) -> dict[str, dict[str, Any]]:
    path = Path(name)
    try:
        metadata = LeRobotDatasetMetadata(path.name, root=path) if path.is_dir() else LeRobotDatasetMetadata(name)
    except Exception as error:  # from the hub or from damaged files
        raise ConfigError(f"model.merge_statistics: {name} is not a LeRobotDataset ({first_line(error)})") from None
    return metadata.stats or {}


def _merged(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    keys = set.intersection(*(set(part) for part in parts))
    weights = np.array([float(part["count"].max()) if "count" in keys else 1.0 for part in parts])
    weights /= weights.sum()

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return sum((w * v for w, v in zip(weights, values, strict=True)), np.zeros_like(values[0]))

    merged = {"min": np.minimum.reduce, "max": np.maximum.reduce}
    result = {key: merge([part[key] for part in parts]) for key, merge in merged.items() if key in keys}
    for key, outer in (("q01", np.minimum), ("q10", np.minimum), ("q90", np.maximum), ("q99", np.maximum)):
        if key in keys:  # the outer one, as for extremes: the range covers both
            result[key] = outer.reduce([part[key] for part in parts])
    if {"mean", "std"} <= keys:
        result["mean"] = mean([part["mean"] for part in parts])
        result["std"] = np.sqrt(mean([part["std"] ** 2 + (part["mean"] - result["mean"]) ** 2 for part in parts]))
    if "count" in keys:
        result["count"] = sum((part["count"] for part in parts), np.zeros_like(parts[0]["count"]))
    return result
