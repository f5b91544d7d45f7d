"""Film strips of the same episodes under the teacher, plain fine-tuning and each constrained arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from craft_ray.report.runs import FinishedRun
from craft_ray.run.metrics import Record

MOST_EPISODES = 3
"""Episodes of each skill that are shown."""
TEACHER = "Teacher, before"


@dataclass(frozen=True)
class Strip:
    """One episode of one model: its `arm` (None for the teacher), how it ended, and its PNG as a data URI."""

    arm: str | None
    label: str
    outcome: str
    uri: str


@dataclass(frozen=True)
class Episode:
    """One initial condition under every model."""

    id: str
    prompt: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class Rollouts:
    """The chosen episodes of a skill, and the sentence that says how they were chosen."""

    skill: str
    note: str
    episodes: tuple[Episode, ...]


def rollouts(runs: Sequence[FinishedRun]) -> list[Rollouts]:
    """The skills for which the first seed's runs kept films. The others are left out."""
    seed = min(run.seed for run in runs)
    found = (_of_skill([run for run in runs if run.seed == seed], skill) for skill in ("old", "new"))
    return [chosen for chosen in found if chosen is not None]


@dataclass(frozen=True)
class _Row:
    """What one model did, by episode."""

    arm: str | None
    label: str
    records: dict[str, Record]


def _of_skill(runs: Sequence[FinishedRun], skill: str) -> Rollouts | None:
    rows = [_Row(None, TEACHER, _by_id(runs[0], f"{skill}_before"))]
    rows += [_Row(run.arm, run.style.label, _by_id(run, f"{skill}_after")) for run in runs]
    filmed = [id_ for id_ in rows[0].records if all("film" in row.records.get(id_, {}) for row in rows)]
    if not filmed:
        return None
    differing = [id_ for id_ in filmed if _kept_what_plain_lost(rows, id_)]
    chosen = [*differing, *(id_ for id_ in filmed if id_ not in differing)][:MOST_EPISODES]
    note = f"Seed {runs[0].seed}, {len(chosen)} of the {len(filmed)} filmed episodes"
    if {row.arm for row in rows} > {None, "baseline"}:
        note += (
            f": first those in which plain fine-tuning failed and a CRaFT arm succeeded ({len(differing)} of "
            f"{len(filmed)}), then the others in their order"
        )
    return Rollouts(skill, f"{note}.", tuple(_episode(rows, id_) for id_ in chosen))


def _by_id(run: FinishedRun, name: str) -> dict[str, Record]:
    return {record["id"]: record for record in run.folder.read_predictions(name)}


def _kept_what_plain_lost(rows: Sequence[_Row], id_: str) -> bool:
    succeeded = {row.arm: row.records[id_]["correct"] for row in rows}
    constrained = [correct for arm, correct in succeeded.items() if arm not in (None, "baseline")]
    return "baseline" in succeeded and not succeeded["baseline"] and any(constrained)


def _episode(rows: Sequence[_Row], id_: str) -> Episode:
    strips = [
        Strip(row.arm, row.label, _outcome(row.records[id_]), "data:image/png;base64," + row.records[id_]["film"])
        for row in rows
    ]
    return Episode(id_, rows[0].records[id_]["prompt"], tuple(strips))


def _outcome(record: Record) -> str:
    return f"success after {record['steps']} steps" if record["correct"] else "no success"
