"""One sample of each source of a run as its model reads it: rendered, tokenised, with what is learnt in brackets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from craft_ray.data.cells import cut
from craft_ray.models.base import Features, Model
from craft_ray.models.capabilities import TokenModel
from craft_ray.retention.constraint import Constraint
from craft_ray.retention.mode import SampleMode
from craft_ray.run.held_out import HeldOut
from craft_ray.run.task_data import TaskData

LONGEST = 600
"""Characters of a sample that are shown."""
REPEATED = 3
"""A token that occurs more often than this in a row is shown once, with the number: images stand for many."""


def shown_samples(model: Model, task: TaskData, constraints: Sequence[Constraint], held_out: HeldOut) -> Iterator[str]:
    """A line for the first sample of the task, for an anchor of each old skill, and for each held-out set; none for a
    model that does not answer in tokens."""
    if not isinstance(model, TokenModel):
        return
    features = model.preprocess_task(task.source[0])
    yield _line("task", task.source[0].id, "learnt", model, features)
    for constraint in constraints:
        if not isinstance(constraint.mode, SampleMode):
            continue  # it holds the weights, and reads no anchors
        anchors = constraint.mode.anchors
        if anchors.identity.inputs != "tensors":
            row, where = (
                constraint.train_rows[0],
                "anchor" if constraint.skill is None else f"anchor of {constraint.skill}",
            )
            features = model.preprocess(anchors.sample(row), anchors.suffix(row) if anchors.has_suffix else None)
            yield _line(where, anchors.id(row), "the teacher's", model, features)
    for section, skill, data in held_out.samples():
        yield _line(f"{section}.{skill}", data.source.ids()[0], "compared", model, data.answered(0))


def _line(where: str, name: str, what: str, model: TokenModel, features: Features) -> str:
    marked = features.layout.predicted
    if "input_ids" not in features.tokens:  # a robot's observation, which is not text
        return f"{where}, sample {name}: {features.layout.length} positions, {len(marked)} of them {what}"
    tokens = features.tokens["input_ids"].tolist()
    return (
        f"{where}, sample {name}: {len(tokens)} tokens, {len(marked)} of them {what}: "
        f"{cut(marked_text(model, tokens, marked), LONGEST)}"
    )


def marked_text(model: TokenModel, tokens: Sequence[int], marked: Sequence[int]) -> str:
    """Tokens as text, those with the marked indices in double brackets."""
    inside = set(marked)
    runs = groupby(range(len(tokens)), key=inside.__contains__)
    return "".join(
        f"[[{_text(model, [tokens[i] for i in run])}]]" if learnt else _text(model, [tokens[i] for i in run])
        for learnt, run in runs
    )


def _text(model: TokenModel, tokens: Sequence[int]) -> str:
    """Tokens as text on one line."""
    parts: list[str] = []
    plain: list[int] = []
    for token, same in groupby(tokens):
        times = len(list(same))
        if times > REPEATED:
            parts += [model.spelled(plain), f"{model.spelled([token])}×{times}"]
            plain = []
        else:
            plain += [token] * times
    return "".join([*parts, model.spelled(plain)]).replace("\n", "\\n")
