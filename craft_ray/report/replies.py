"""What the teacher and each arm answer on the new skill, before and after."""

from __future__ import annotations

from collections.abc import Sequence

from craft_ray.config import SampleEvalSet
from craft_ray.report.examples import Example, Examples, example, read_samples
from craft_ray.report.runs import FinishedRun
from craft_ray.run.metrics import Record

MOST = 6


def replies(runs: Sequence[FinishedRun]) -> Examples | None:
    """The first held-out samples of the new skill, with the answers of the first seed's runs. None if no answers
    were generated or chosen, for episodes, and for tasks of a harness."""
    seed = min(run.seed for run in runs)
    own = [run for run in runs if run.seed == seed]
    eval_set = own[0].config.evaluation.new
    if not isinstance(eval_set, SampleEvalSet):
        return None
    said: dict[str, dict[str, Record]] = {"Teacher, before": _answered(own[0], "new_before")}
    said |= {run.style.label: _answered(run, "new_after") for run in own}
    ids = [id_ for id_ in next(iter(said.values())) if all(id_ in records for records in said.values())][:MOST]
    if not ids:
        return None
    last = [*said.values()][-1]
    samples, problem = read_samples(eval_set, "evaluation.new.data", ids, last)
    chosen: list[Example] = [
        example(last[id_], samples.get(id_), tuple((name, records[id_]) for name, records in said.items()))
        for id_ in ids
    ]
    return Examples(chosen, f"Seed {seed}: the first {len(ids)} held-out samples, in data order.", problem)


def _answered(run: FinishedRun, name: str) -> dict[str, Record]:
    return {record["id"]: record for record in run.folder.read_predictions(name) if "prediction" in record}
