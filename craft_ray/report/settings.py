"""The settings in which the arms differ, and the check that the runs of one arm do not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from craft_ray.config import deciding_settings
from craft_ray.errors import ConfigError
from craft_ray.report.runs import FinishedRun

WHERE = ("seed", "name", "variant", "output_dir", "about", "compare", "workers")
"""Keys and sections that distinguish runs or say where they ran; they do not decide an arm's numbers."""


@dataclass(frozen=True)
class Difference:
    """A dotted key and its value in each arm, in the order of the arms."""

    key: str
    values: tuple[str, ...]


def differences(runs: Sequence[FinishedRun]) -> list[Difference]:
    """The keys in which the arms differ. `craft` settings of an arm without CRaFT are shown as unused.

    Raises:
        ConfigError: two runs of one arm differ in more than their seed.
    """
    arms: dict[str, FinishedRun] = {}
    for run in runs:
        first = arms.setdefault(run.arm, run)
        _check_one_arm(first, run)
    flat = [
        _settings(run, together=any(other.config.adapter is None for other in arms.values())) for run in arms.values()
    ]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    found = []
    for key in keys:
        values = tuple(_shown(key, settings) for settings in flat)
        if key.split(".")[0] not in WHERE and len({value for value in values if value != UNUSED}) > 1:
            found.append(Difference(key, values))
    return found


def _settings(run: FinishedRun, together: bool) -> dict[str, Any]:
    """A run's settings by dotted key.

    Args:
        together: show an adapter as one setting, because another arm has none.
    """
    tree, adapter = run.config.model_dump(mode="json"), run.config.adapter
    if together:
        tree["adapter"] = None if adapter is None else f"{adapter.kind}, r {adapter.r}"
    return dict(_flat(tree))


UNUSED = "–"


def _shown(key: str, settings: dict[str, Any]) -> str:
    unused = key not in settings or (
        key.startswith("craft.") and key != "craft.enabled" and not settings["craft.enabled"]
    )
    return UNUSED if unused else _text(settings[key])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_one_arm(first: FinishedRun, run: FinishedRun) -> None:
    ours, theirs = (dict(_flat(deciding_settings(r.config))) for r in (first, run))
    for key in dict.fromkeys([*ours, *theirs]):
        if key in ("seed", "name", "variant", "model.path"):  # the last has a hash, which is compared
            continue
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"the {run.arm} runs are not comparable: {key} is {ours.get(key)} in {first.folder.path}, but "
                f"{theirs.get(key)} in {run.folder.path}; runs of one arm may differ only in their seed"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
