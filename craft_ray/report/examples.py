"""Held-out samples of the old skill on which a CRaFT arm and plain fine-tuning differ.

For answers: those that plain fine-tuning got wrong and CRaFT got right, in the order of the data. For texts: those
whose loss per token differs most, or the first ones if the models' replies to them were generated. A note says how many
were chosen out of how many, and how many show the opposite.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from craft_ray.config import RolloutEvalSet, SampleEvalSet
from craft_ray.data.images import decode_image
from craft_ray.data.sample import Sample
from craft_ray.data.source import Source, open_source
from craft_ray.errors import CraftError
from craft_ray.report.arms import ARMS
from craft_ray.report.runs import FinishedRun
from craft_ray.report.wording import number
from craft_ray.run.metrics import Record
from craft_ray.run.scoring import OF_TEXT, outcome

MOST_ANSWERS, MOST_TEXTS = 12, 6
LONGEST_TEXT = 320
"""Characters shown of a text."""
LARGEST_IMAGE = 320
"""Pixels along the longer side; a larger image is shrunk to it."""
PIXEL_ART = 96
"""Images up to this size, in pixels, are enlarged without smoothing."""


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI. `pixelated`: small enough that smoothing would blur it."""

    uri: str
    pixelated: bool


@dataclass(frozen=True)
class Example:
    """One sample: its prompt, its correct response, and `(name, answer)` for the teacher, plain and CRaFT."""

    id: str
    prompt: str
    response: str
    outcomes: tuple[tuple[str, str], ...]
    picture: Picture | None
    scored: bool
    """Whether the outcomes are losses of the response, rather than answers."""


@dataclass(frozen=True)
class Examples:
    """The chosen samples, and the sentences that say how they were chosen and what is missing."""

    chosen: list[Example]
    note: str
    problem: str | None


def examples(runs: Sequence[FinishedRun]) -> Examples | None:
    """None if no seed has both plain fine-tuning and CRaFT with predictions of the old skill, and for episodes, which
    craft_ray.report.rollouts shows."""
    pair = _pair(runs)
    if pair is None:
        return None
    plain, craft = pair
    eval_set = craft.config.evaluation.old
    assert eval_set is not None, "predictions were written, so the skill was evaluated"
    if isinstance(eval_set, RolloutEvalSet):
        return None
    predictions = _Predictions(plain, craft)
    select = _texts if eval_set.metric in OF_TEXT else _answers
    ids, note = select(predictions)
    samples: dict[str, Sample] = {}
    problem = None
    if isinstance(eval_set, SampleEvalSet):
        samples, problem = read_samples(eval_set, "evaluation.old.data", ids, predictions.craft)
    chosen = [example(predictions.craft[id_], samples.get(id_), predictions.outcomes(id_)) for id_ in ids]
    return Examples(chosen, note, problem)


class _Predictions:
    """What teacher, plain fine-tuning and CRaFT did with each sample, by id."""

    def __init__(self, plain: FinishedRun, craft: FinishedRun) -> None:
        self.seed = craft.seed
        self.craft_label = craft.style.label
        self.plain = _by_id(plain, "old_after")
        self.craft = _by_id(craft, "old_after")
        self.teacher = _by_id(craft, "old_before")
        self.ids = [id_ for id_ in self.plain if id_ in self.craft]

    def outcomes(self, id_: str) -> tuple[tuple[str, Record], ...]:
        who = (("Teacher", self.teacher), (ARMS["baseline"].label, self.plain), (self.craft_label, self.craft))
        return tuple((name, records[id_]) for name, records in who if id_ in records)


def _pair(runs: Sequence[FinishedRun]) -> tuple[FinishedRun, FinishedRun] | None:
    """Plain fine-tuning and CRaFT of the first seed that has both; hidden before token_ce before variants."""
    usable = [run for run in runs if run.folder.read_predictions("old_after")]
    plain = {run.seed: run for run in usable if run.arm == "baseline"}
    for arm in dict.fromkeys(["hidden", "token_ce", *(run.arm for run in usable if run.arm != "baseline")]):
        for run in usable:
            if run.arm == arm and run.seed in plain:
                return plain[run.seed], run
    return None


def _by_id(run: FinishedRun, name: str) -> dict[str, Record]:
    return {record["id"]: record for record in run.folder.read_predictions(name)}


def _answers(predictions: _Predictions) -> tuple[list[str], str]:
    def differ(wrong: dict[str, Record], right: dict[str, Record]) -> list[str]:
        return [id_ for id_ in predictions.ids if outcome(right[id_]) > outcome(wrong[id_])]

    kept, lost = differ(predictions.plain, predictions.craft), differ(predictions.craft, predictions.plain)
    shown = kept[:MOST_ANSWERS]
    graded = any("score" in predictions.craft[id_] for id_ in predictions.ids)
    note = (
        f"Seed {predictions.seed}: of {len(predictions.ids)} held-out samples of the old skill, "
        + (
            f"{len(kept)} score lower after plain fine-tuning than after {predictions.craft_label}"
            if graded
            else f"plain fine-tuning got {len(kept)} wrong that {predictions.craft_label} got right"
        )
        + f", and {len(lost)} the other way round. "
    )
    return shown, note + (f"Shown are the first {len(shown)} of the {len(kept)}, in data order." if shown else "")


def _texts(predictions: _Predictions) -> tuple[list[str], str]:
    def gain(id_: str) -> float:
        return _per_token(predictions.plain[id_]) - _per_token(predictions.craft[id_])

    better = sorted((id_ for id_ in predictions.ids if gain(id_) > 0), key=gain, reverse=True)
    replied = [id_ for id_ in predictions.ids if "prediction" in predictions.craft[id_]]
    shown = replied[:MOST_ANSWERS] or better[:MOST_TEXTS]
    note = (
        f"Seed {predictions.seed}: of {len(predictions.ids)} held-out samples of the old skill, {len(better)} are "
        f"more likely under {predictions.craft_label} than under plain fine-tuning. "
    )
    if replied:
        return shown, note + (
            f"Shown are the first {len(shown)} in data order, with what each model replies to them and its loss on the "
            f"expected reply."
        )
    return shown, note + (
        f"Shown are the {len(shown)} that differ most, with the loss of each model in nats per token." if shown else ""
    )


def _per_token(record: Record) -> float:
    value: float = record["nll"] / record["tokens"]
    return value


def _outcome(record: Record) -> str:
    if "score" in record:
        return f"{_short(record['prediction'])} (score {number(record['score'])})"
    if "nll" not in record:
        return _short(record["prediction"])
    loss = f"{number(_per_token(record))} nats per token"
    return f"{_short(record['prediction'])} ({loss})" if "prediction" in record else loss


def read_samples(
    eval_set: SampleEvalSet, key: str, ids: Sequence[str], records: Mapping[str, Record]
) -> tuple[dict[str, Sample], str | None]:
    """The samples, from where the run read them, and the problem to report if they are no longer there.

    Args:
        records: what the run recorded of them, by id.
    """
    if not ids:
        return {}, None
    try:
        source = open_source(eval_set.data, key)
        found = _find(source, ids)
    except CraftError as error:
        return {}, f"The samples themselves could not be read again: {error.message}"
    for id_ in ids:
        if id_ not in found or not _same(found[id_], records[id_]):
            return {}, (
                f"{source.name} has changed since the runs were scored (sample {id_} is missing or different), so "
                f"none of its samples are shown."
            )
    return found, None


def _same(sample: Sample, record: Record) -> bool:
    """Whether a sample is still the one that was scored. A perplexity record has only the id to compare."""
    return "nll" in record or (sample.prompt, str(sample.response).strip()) == (record["prompt"], record["response"])


def _find(source: Source, ids: Sequence[str]) -> dict[str, Sample]:
    rows = {id_: row for row, id_ in enumerate(source.ids())}
    return {id_: source[rows[id_]] for id_ in ids if id_ in rows}


def example(record: Record, sample: Sample | None, outcomes: Sequence[tuple[str, Record]]) -> Example:
    """A sample as the page shows it, with what models did with it by their names."""
    id_ = record["id"]
    prompt = sample.prompt if sample is not None else record.get("prompt", "")
    response = str(sample.response) if sample is not None else record.get("response", "")
    image = None if sample is None or sample.image is None else _picture(sample.image, id_)
    said = tuple((name, _outcome(outcome)) for name, outcome in outcomes)
    return Example(id_, _short(prompt), _short(response), said, image, "nll" in record)


def _picture(data: bytes, id_: str) -> Picture:
    image = decode_image(data, f"sample {id_}")
    pixelated = max(image.size) <= PIXEL_ART
    image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), pixelated)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT].rstrip() + " …"
